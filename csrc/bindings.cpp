// The whole boundary with Python. A tensor comes as what it is in memory; nothing here knows of
// torch.
#include <sstream>

#include "bind_operators.h"
#include "cpu/kernels.h"
#include "cpu/thresholds.h"

namespace py = pybind11;
using namespace fastkd;

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled kernels of fastkd; see fastkd.kernels.native.";
  bind_operators(m);

  m.def("isa", [] { return kernels().isa; }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        const char* names[3];
        return std::vector<std::string>(names, names + available(names));
      },
      "The instruction sets that can run here, best first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!use(name.c_str())) throw py::value_error("no kernels for " + name + " run here");
      },
      "Use another instruction set's kernels from now on.");
  m.def(
      "thresholds",
      [] {
        py::dict all;
        for (const Threshold* one = known_thresholds; one->name != nullptr; ++one)
          all[one->name] = thresholds.*one->member;
        return all;
      },
      "The sizes from which on CPU kernels take another way, by name; for tests.");
  m.def(
      "set_thresholds",
      [](const py::kwargs& values) {
        for (const auto& [name, value] : values)
          set_threshold(name.cast<std::string>().c_str(), value.cast<int64_t>());
      },
      "Use other sizes from now on, of those that `thresholds` has; for tests.");
  m.def(
      "openmp",
      [] {
#ifdef FASTKD_OPENMP
        return true;
#else
        return false;
#endif
      },
      "Whether the module was built with OpenMP.");

  std::vector<std::string> cuda_archs;
#ifdef FASTKD_CUDA_ARCHS
  std::istringstream joined(FASTKD_CUDA_ARCHS);
  for (std::string arch; std::getline(joined, arch, ';');) cuda_archs.push_back(arch);
  m.def("cuda_problem", cuda::problem, py::call_guard<py::gil_scoped_release>());
#endif
  m.def(
      "cuda_archs", [cuda_archs] { return cuda_archs; },
      "The compute capabilities that CUDA kernels were compiled for, as 90 for 9.0.");
}
