// Whether this module's kernels can run on a device.
#include "launch.h"
#include "scratch.h"

namespace fastkd::cuda {
namespace {

__global__ void any_kernel() {}

}  // namespace

std::string problem(int device) {
  try {
    const Stream stream({device, 0});
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, any_kernel), "looking for machine code");
    return {};
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace fastkd::cuda
