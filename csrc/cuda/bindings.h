// The CUDA kernels' part of the boundary with Python. The last two arguments of each function are
// the device's index and the stream.
#pragma once

#include <pybind11/stl.h>

#include "../arguments.h"
#include "../tensor_caster.h"
#include "kernels.h"

namespace fastkd::cuda {

inline void bind(pybind11::module_& m) {
  using unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("cuda_problem", problem, unlocked());
  m.attr("cuda_scratch_bytes") = kScratchBytes;
  m.attr("cuda_soft_target_scratch_bytes") = kSoftTargetScratchBytes;
  m.def(
      "cuda_soft_target_forward",
      [](const Tensor& student, const Tensor& teacher, uintptr_t labels, const Tensor& loss,
         uintptr_t statistics, const Tensor& gradient, uintptr_t scratch,
         const SoftTargetArguments& p, int device, uintptr_t stream) {
        soft_target_forward(student, teacher, reinterpret_cast<const int64_t*>(labels), loss,
                            reinterpret_cast<void*>(statistics), gradient,
                            reinterpret_cast<void*>(scratch), p, {device, stream});
      },
      unlocked());
  m.def(
      "cuda_soft_target_backward",
      [](const Tensor& grad_output, const Tensor& student, const Tensor& teacher, uintptr_t labels,
         uintptr_t statistics, const Tensor& to_student, const Tensor& to_teacher, bool in_place,
         const SoftTargetArguments& p, int device, uintptr_t stream) {
        soft_target_backward(grad_output, student, teacher,
                             reinterpret_cast<const int64_t*>(labels),
                             reinterpret_cast<const void*>(statistics), to_student, to_teacher,
                             in_place, p, {device, stream});
      },
      unlocked());
  m.def(
      "cuda_soft_target_ensemble",
      [](const Tensor& student, const Tensors& teachers, const std::vector<double>& weights,
         uintptr_t labels, const Tensor& loss, uintptr_t parts, const Tensor& gradient,
         const Tensor& grad_output, bool in_place, uintptr_t scratch, const SoftTargetArguments& p,
         int device, uintptr_t stream) {
        soft_target_ensemble(student, teachers, weights, reinterpret_cast<const int64_t*>(labels),
                             loss, reinterpret_cast<void*>(parts), gradient, grad_output, in_place,
                             reinterpret_cast<void*>(scratch), p, {device, stream});
      },
      unlocked());
  m.def(
      "cuda_attention_map_forward",
      [](const Tensor& features, const Tensor& raw, uintptr_t winners, const MapArguments& p,
         int device, uintptr_t stream) {
        attention_map_forward(features, raw, reinterpret_cast<int32_t*>(winners), p,
                              {device, stream});
      },
      unlocked());
  m.def("cuda_attention_scratch_bytes", attention_scratch_bytes, unlocked());
  m.def(
      "cuda_attention_transfer_forward",
      [](const Tensors& students, const Tensors& teachers, const Tensor& loss,
         const Tensors& slopes, const std::vector<uintptr_t>& winners, uintptr_t scratch,
         const TransferArguments& transfer, const MapArguments& p, int device, uintptr_t stream) {
        attention_transfer_forward(students, teachers, loss, slopes, winners_at(winners),
                                   reinterpret_cast<void*>(scratch), transfer, p, {device, stream});
      },
      unlocked());
  m.def(
      "cuda_attention_backward",
      [](const Tensor& grad_output, const Tensors& features, const Tensors& slopes,
         const std::vector<uintptr_t>& winners, const Tensors& gradients, const MapArguments& p,
         int device, uintptr_t stream) {
        attention_backward(grad_output, features, slopes, winners_at(winners), gradients, p,
                           {device, stream});
      },
      unlocked());
  m.def(
      "cuda_hint_scratch_bytes",
      [](const Tensors& students, const Tensors& teachers, const Tensors& gradients,
         int arithmetic) {
        return hint_scratch_bytes(students, teachers, gradients, DType(arithmetic));
      },
      unlocked());
  m.def(
      "cuda_hint_forward",
      [](const Tensors& students, const Tensors& teachers, const Tensor& loss,
         const Tensors& gradients, uintptr_t scratch, double scale, int reduction, int device,
         uintptr_t stream) {
        hint_forward(students, teachers, loss, gradients, reinterpret_cast<void*>(scratch), scale,
                     Reduction(reduction), {device, stream});
      },
      unlocked());
  m.def(
      "cuda_hint_backward",
      [](const Tensor& grad_output, const Tensors& students, const Tensors& teachers,
         const Tensors& gradients, bool in_place, double scale, int reduction, int device,
         uintptr_t stream) {
        hint_backward(grad_output, students, teachers, gradients, in_place, scale,
                      Reduction(reduction), {device, stream});
      },
      unlocked());
  m.def(
      "cuda_squared_distances",
      [](const Tensor& x, const Tensor& to, int device, uintptr_t stream) {
        squared_distances(x, to, {device, stream});
      },
      unlocked());
  m.attr("cuda_rkd_scratch_bytes") = kRkdScratchBytes;
  const auto bind_rkd = [&](const char* name, auto* function) {
    m.def(
        name,
        [function](const Tensor& student, const Tensor& teacher, const Tensor& loss,
                   const Tensor& slopes, uintptr_t scratch, double delta, int device,
                   uintptr_t stream) {
          function(student, teacher, loss, slopes, reinterpret_cast<void*>(scratch), delta,
                   {device, stream});
        },
        unlocked());
  };
  bind_rkd("cuda_rkd_distance", rkd_distance);
  bind_rkd("cuda_rkd_angle", rkd_angle);
  m.def("cuda_similarity_scratch_bytes", similarity_scratch_bytes, unlocked());
  m.def(
      "cuda_similarity",
      [](const Tensor& student, const Tensor& teacher, const Tensor& loss, const Tensor& slopes,
         uintptr_t scratch, int device, uintptr_t stream) {
        similarity_preserving(student, teacher, loss, slopes, reinterpret_cast<void*>(scratch),
                              {device, stream});
      },
      unlocked());
  m.def(
      "cuda_multiply",
      [](const Tensors& gradients, const Tensor& grad_output, int device, uintptr_t stream) {
        multiply(gradients, grad_output, {device, stream});
      },
      unlocked());
}

}  // namespace fastkd::cuda
