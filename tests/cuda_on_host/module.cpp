// The CUDA kernels on the host, behind the same boundary with Python as in the real module. Tensors
// on the CPU pass for those of a device.
#define FASTKD_NO_CPU
#define FASTKD_CUDA_ARCHS ""
#include "bind_operators.h"
#include "cuda_on_host.h"

PYBIND11_MODULE(_native, m) {
  fastkd::bind_operators(m);
  m.def("set_schedule", cuda_on_host::set_schedule, "The seed of the threads' order from now on.");
  m.def(
      "bulk_copies_begun", [] { return cuda_on_host::bulk_copies_begun; },
      "How many bulk copies kernels have asked for so far.");
  m.def("set_capturing", cuda_on_host::set_capturing, "Whether launches go into a CUDA graph.");
}
