// A call as rows and axes, from the tensors that an operator is called with.
#pragma once

#include <algorithm>
#include <cfloat>
#include <stdexcept>

#include "soft_target_forms.h"
#include "soft_target_mean.h"

namespace fastkd::cuda::logits {

// Beyond so many classes a thread by itself would take too long, with several teachers.
constexpr int64_t kMostColumnClasses = 4096;

// A call, and whether its rows rather than its classes are contiguous. `mean` is there, and holds
// the call, where there are several teachers; what is known of the tensors takes them all. Without
// teachers the call is on a student alone, and says itself whether its arithmetic is in float64.
class Plan {
 public:
  Plan(Call& call, MeanCall* mean, const fastkd::Tensor& student, const Tensors& teachers,
       const fastkd::Tensor& labels, const fastkd::Tensor& to_student,
       const fastkd::Tensor& to_teacher, const SoftTargetParameters& p, bool has_temperatures)
      : call_(call), mean_(mean), teachers_(teachers) {
    call.classes = student.sizes[p.dim];
    call.share = 1 / double(call.classes);
    call.labels = labels.as<int64_t>();
    call.ignore_index = p.ignore_index;
    call.has_hard =
        call.labels != nullptr && p.labels_are_classes && (p.temperature != 1 || has_temperatures);
    call.reduction = p.reduction;
    call.divergence = p.divergence;
    call.temperature = p.temperature;
    call.soft_weight = p.soft_weight;
    call.hard_weight = p.hard_weight;
    call.smoothing = call.labels == nullptr ? 0 : p.label_smoothing;
    call.all_classes = p.all_classes;
    // Where the largest logit alone counts, or all count the same, 0 · inf would be NaN.
    call.rate = float(
        std::min(std::max(kLog2E / p.temperature / kLogitScale, double(FLT_MIN)), double(FLT_MAX)));
    call.is_double = call.is_double || student.dtype == DType::f64;
    const fastkd::Tensor* const teacher =
        mean == nullptr && !teachers.empty() ? &teachers[0] : &student;
    const fastkd::Tensor* const sides[] = {&student, teacher, &to_student, &to_teacher};
    for (int side = 0; side < kSides; ++side) {
      like_[side] = *sides[side] ? sides[side] : sides[side % kToStudent];
      call.sides[side] = tensor(sides[side]->data, *like_[side], p.dim);
    }
    if (mean != nullptr && (teachers.size() > kMostTeachers || teachers.size() != p.weights.size()))
      throw std::invalid_argument("too many teachers, or not as many weights");
    if (mean != nullptr) mean->have_one_dtype = true;
    for (size_t m = 0; m < teachers.size(); ++m) {
      call.is_double = call.is_double || teachers[m].dtype == DType::f64;
      if (mean == nullptr) continue;
      mean->have_one_dtype = mean->have_one_dtype && teachers[m].dtype == student.dtype;
      mean->teachers[mean->count++] = {tensor(teachers[m].data, teachers[m], p.dim), p.weights[m]};
    }
    find_axes(student, p.dim);
    mean == nullptr ? find_layout() : find_layout_of_mean();
  }

  bool are_columns = false;

 private:
  Call& call_;
  MeanCall* const mean_;
  const Tensors& teachers_;
  const fastkd::Tensor* like_[kSides];  // a gradient that is absent moves with its tensor

  Tensor tensor(char* data, const fastkd::Tensor& like, int dim) const {
    return {data, like.dtype, call_.classes == 1 ? 1 : like.strides[dim]};
  }

  void find_axes(const fastkd::Tensor& student, int dim) {
    int64_t rows = 1;
    for (int d = 0; d < student.ndim; ++d) {
      if (d == dim || student.sizes[d] == 1) continue;
      rows *= student.sizes[d];
      Axis axis{uint32_t(student.sizes[d]), {}};
      const int last = call_.axes - 1;
      bool merges = last >= 0;
      for (int side = 0; side < kSides; ++side) {
        axis.stride[side] = like_[side]->strides[d];
        merges = merges && call_.axis[last].stride[side] == axis.stride[side] * student.sizes[d];
      }
      for (int m = 0; merges && mean_ != nullptr && m < mean_->count; ++m)
        merges = mean_->row_stride[last][m] == teachers_[m].strides[d] * student.sizes[d];
      const int a = merges ? last : call_.axes++;
      if (merges) axis.size *= call_.axis[a].size;
      call_.axis[a] = axis;
      for (int m = 0; mean_ != nullptr && m < mean_->count; ++m)
        mean_->row_stride[a][m] = teachers_[m].strides[d];
    }
    if (rows > UINT32_MAX) throw std::invalid_argument("too many rows of logits for a GPU");
    call_.rows = uint32_t(rows);
  }

  // Whether rows, or vectors of so many elements in them, begin at multiples of so many bytes.
  bool is_aligned(int side, int64_t bytes) const {
    const Tensor& tensor = call_.sides[side];
    bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0;
    for (int a = 0; a < call_.axes; ++a)
      aligned = aligned && call_.axis[a].stride[side] * size_of(tensor.dtype) % bytes == 0;
    return aligned;
  }

  void find_layout() {
    int along_classes = 0, along_rows = 0;
    call_.is_dense = call_.is_aligned = true;
    for (int side = 0; side < kSides; ++side) {
      const Tensor& tensor = call_.sides[side];
      if (tensor.data == nullptr) continue;
      along_classes += tensor.class_stride == 1;
      along_rows += call_.axes > 0 && call_.axis[call_.axes - 1].stride[side] == 1;
      call_.is_dense = call_.is_dense && tensor.class_stride == 1;
      call_.is_aligned = call_.is_aligned && is_aligned(side, kAccess);
    }
    call_.is_aligned = call_.is_aligned && call_.is_dense;
    are_columns = along_rows > along_classes && !call_.is_double && call_.classes <= INT32_MAX;
    call_.inverse =
        call_.is_double ? 1 / call_.temperature : double(call_.rate) * kLogitScale / kLog2E;
  }

  // The student's layout counts, with its gradient's; each teacher's is found out where it is read.
  void find_layout_of_mean() {
    const Tensor& student = call_.sides[kStudent];
    const Tensor& gradient = call_.sides[kToStudent];
    call_.is_dense = student.class_stride == 1 && !call_.is_double;
    // Where dtypes differ, a vector takes two accesses on one side for one on the other.
    const int64_t bytes =
        mean_->have_one_dtype ? kAccess : kVector<Any, Any> * size_of(student.dtype);
    call_.is_aligned =
        call_.is_dense && is_aligned(kStudent, bytes) &&
        (gradient.data == nullptr || (gradient.class_stride == 1 && is_aligned(kToStudent, bytes)));
    if (call_.axes > 0 && call_.classes <= kMostColumnClasses) {
      const int last = call_.axes - 1;
      int along_classes = student.class_stride == 1;
      int along_rows = call_.axis[last].stride[kStudent] == 1;
      for (int m = 0; m < mean_->count; ++m) {
        along_classes += mean_->teachers[m].tensor.class_stride == 1;
        along_rows += mean_->row_stride[last][m] == 1;
      }
      are_columns = along_rows > along_classes;
    }
    const double rate =
        call_.is_double ? kLog2E / call_.temperature : double(call_.rate) * kLogitScale;
    const int exponent = std::max(std::ilogb(rate), 0);
    mean_->of_logarithm = std::ldexp(kLogitScale, -exponent);
    mean_->of_logit = std::ldexp(rate, -exponent);
    call_.inverse = std::ldexp(1 / kLog2E, exponent);
  }
};

}  // namespace fastkd::cuda::logits
