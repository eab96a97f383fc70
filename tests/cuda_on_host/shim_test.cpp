// Small kernels on which the shim itself is tested.
#include "shim_test.h"

PYBIND11_MODULE(_shim_test, m) {
#ifdef __SANITIZE_ADDRESS__
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  m.def("set_schedule", &cuda_on_host::set_schedule);
  m.def("set_multiprocessors", &cuda_on_host::set_multiprocessors);
  m.def("set_capability", &cuda_on_host::set_capability);
  define_barriers(m);
  define_copies(m);
  define_mbarriers(m);
  define_primitives(m);
  define_errors(m);
}
