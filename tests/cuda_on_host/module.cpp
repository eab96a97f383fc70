// The CUDA kernels on the host, behind the same boundary with Python as in the real module. Tensors
// on the CPU pass for those of a device.
#define FASTKD_NO_CPU
#define FASTKD_CUDA_ARCHS ""
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <vector>

#include "bind_operators.h"
#include "cuda_on_host.h"
#include "tickets.h"

namespace {

namespace py = pybind11;
using namespace fastkd::cuda;

std::optional<int> take(CounterPool& pool, uintptr_t stream, size_t count) {
  std::vector<unsigned> own(count, 1);
  const Tickets tickets = pool.take(Stream({0, stream}), own.data(), count);
  const bool is_own = tickets.first < 0;
  if (own != std::vector<unsigned>(count, is_own ? 0 : 1))
    throw std::runtime_error("counters must be cleared in memory of their own, and only there");
  return is_own ? std::nullopt : std::optional(tickets.first);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  fastkd::bind_operators(m);
  m.def("set_schedule", cuda_on_host::set_schedule, "The seed of the threads' order from now on.");
  m.def(
      "bulk_copies_begun", [] { return cuda_on_host::bulk_copies_begun; },
      "How many bulk copies kernels have asked for so far.");
  m.def("set_capturing", cuda_on_host::set_capturing, "Whether launches go into a CUDA graph.");
  m.def(
      "restart_captured_counters",
      [](int most) {
        grid_counters.restart(most);
        attention_counters.restart(most);
      },
      "Captured launches get at most so many counters, from the first one on again.");
  py::class_<CounterPool>(m, "CounterPool")
      .def(py::init([](int of_stream, int streams, int captured) {
        return std::make_unique<CounterPool>(CounterSpace{of_stream, streams, captured});
      }))
      .def("restart", &CounterPool::restart)
      .def("take", &take, "The first of so many counters; None for memory of its own.");
}
