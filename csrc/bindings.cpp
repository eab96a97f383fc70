// The whole boundary with Python. A plain buffer comes as its address; nothing here knows of torch.
#include <pybind11/stl.h>

#include <sstream>

#ifdef FASTKD_OPENMP
#include <omp.h>
#endif

#include "arguments.h"
#include "cpu/calls.h"
#include "cpu/thresholds.h"
#include "tensor_caster.h"

#ifdef FASTKD_CUDA_ARCHS
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using namespace fastkd;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Hint : calls::HintParameters {
  Hint(double scale, int reduction, int threads)
      : calls::HintParameters{scale, Reduction(reduction), threads} {}
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled kernels of fastkd; see fastkd.kernels.native.";

  bind_arguments(m);
  py::class_<Hint>(m, "Hint").def(py::init<double, int, int>());

  using unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "soft_target_forward",
      [](const Tensor& student, const Tensor& teacher, Address labels, Address loss,
         Address statistics, const Tensor& gradient, const SoftTargetArguments& p) {
        calls::soft_target_forward(student, teacher, at<const int64_t>(labels), at<void>(loss),
                                   at<void>(statistics), gradient, p);
      },
      unlocked());
  m.def(
      "soft_target_backward",
      [](const Tensor& grad_output, const Tensor& student, const Tensor& teacher, Address labels,
         Address statistics, const Tensor& to_student, const Tensor& to_teacher,
         const SoftTargetArguments& p) {
        calls::soft_target_backward(grad_output, student, teacher, at<const int64_t>(labels),
                                    at<const void>(statistics), to_student, to_teacher, p);
      },
      unlocked());
  m.def(
      "soft_target_ensemble",
      [](const Tensor& student, const Tensors& teachers, const std::vector<double>& weights,
         Address labels, Address loss, Address parts, const Tensor& gradient,
         const Tensor& grad_output, const SoftTargetArguments& p) {
        calls::soft_target_ensemble(student, teachers, weights, at<const int64_t>(labels),
                                    at<void>(loss), at<void>(parts), gradient, grad_output, p);
      },
      unlocked());
  m.def(
      "attention_map_forward",
      [](const Tensor& features, const Tensor& raw, Address winners, const MapArguments& p) {
        calls::attention_map_forward(features, raw, at<int32_t>(winners), p);
      },
      unlocked());
  m.def(
      "attention_transfer_forward",
      [](const Tensors& students, const Tensors& teachers, const Tensor& loss,
         const Tensors& slopes, const std::vector<Address>& winners, const Tensors& gradients,
         const TransferArguments& transfer, const MapArguments& p) {
        calls::attention_transfer_forward(students, teachers, loss, slopes, winners_at(winners),
                                          gradients, transfer, p);
      },
      unlocked());
  m.def(
      "attention_backward",
      [](const Tensor& grad_output, const Tensors& features, const Tensors& slopes,
         const std::vector<Address>& winners, const Tensors& gradients, const MapArguments& p) {
        calls::attention_backward(grad_output, features, slopes, winners_at(winners), gradients, p);
      },
      unlocked());
  m.def(
      "hint_forward",
      [](const Tensors& students, const Tensors& teachers, const Tensor& loss,
         const Tensors& gradients,
         const Hint& p) { calls::hint_forward(students, teachers, loss, gradients, p); },
      unlocked());
  m.def(
      "hint_backward",
      [](const Tensor& grad_output, const Tensors& students, const Tensors& teachers,
         const Tensors& gradients,
         const Hint& p) { calls::hint_backward(grad_output, students, teachers, gradients, p); },
      unlocked());
  m.def("squared_distances", calls::squared_distances, unlocked());
  m.def("rkd_distance", calls::rkd_distance, unlocked());
  m.def("rkd_angle", calls::rkd_angle, unlocked());
  m.def("similarity", calls::similarity, unlocked());
  m.def(
      "max_pool",
      [](const Tensor& features, const Tensor& pooled, Address winners, int threads) {
        calls::max_pool(features, pooled, at<int32_t>(winners), threads);
      },
      unlocked());
  m.def(
      "max_pool_backward",
      [](const Tensor& grad_output, Address winners, const Tensor& gradient, int threads) {
        calls::max_pool_backward(grad_output, at<const int32_t>(winners), gradient, threads);
      },
      unlocked());

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
  cuda::bind(m);
#endif
  m.def(
      "cuda_archs", [cuda_archs] { return cuda_archs; },
      "The compute capabilities that CUDA kernels were compiled for, as 90 for 9.0.");
}
