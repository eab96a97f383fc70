// What the kernels of the shim's tests share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda_runtime.h"

namespace py = pybind11;

void define_barriers(py::module_&);
void define_copies(py::module_&);
void define_mbarriers(py::module_&);
void define_primitives(py::module_&);
void define_errors(py::module_&);

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
__device__ T* shared() {
  return static_cast<T*>(cuda_on_host::shared_memory());
}

inline __device__ unsigned thread_of_grid() { return blockIdx.x * blockDim.x + threadIdx.x; }

struct Launch {
  unsigned blocks, threads, shared_bytes = 0, cluster = 1;
  bool cooperative = false;
  dim3 grid = dim3(blocks), block = dim3(threads);

  template <class... Parameters, class... Arguments>
  cudaError_t status(void (*kernel)(Parameters...), Arguments... arguments) const {
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = cooperative;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {cluster, 1, 1};
    const unsigned used = cluster == 1 ? 1 : 2;
    const cudaLaunchConfig_t config{grid, block, shared_bytes, nullptr, attributes, used};
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), Arguments... arguments) const {
    const cudaError_t error = status(kernel, arguments...);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
  }
};
