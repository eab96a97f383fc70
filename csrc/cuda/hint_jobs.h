// What a launch of the hint kernel does: jobs, of one pair of features each, cut into units that
// one warp does at a time.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../reduction.h"

namespace fastkd::cuda {

// How a warp goes through a unit, which is a rectangle of a plane.
// vectors: a stretch that lies side by side in every tensor, 16 bytes at a time.
// transposed: a square, of which student and teacher each have another side in memory.
// elements: element by element, whatever the strides.
enum class Access : int { vectors, transposed, elements };

enum Side { kStudent, kTeacher, kGradient, kSides };

struct Axis {
  int64_t size = 1;
  int64_t stride[kSides] = {};  // in elements
};

constexpr int kSquare = 32;     // side of a unit of transposed access
constexpr int kElements = 128;  // at most, of a unit of access by elements

// Access by vectors, by the sizes of student's and teacher's elements. A lane moves 16 bytes of the
// smaller ones at a time, and has 96 or 128 bytes of both tensors in flight.
struct Vectors {
  int length, at_once, unit;
  constexpr Vectors(int64_t student, int64_t teacher)
      : length(int(16 / (student < teacher ? student : teacher))),
        at_once(student == teacher ? 4 : 2),
        unit(32 * length * at_once) {}
};

// Rows (samples where they are summed apart, otherwise one) × outer axes × plane (width × length).
// Units are counted in 32 bits, which divide many times as fast as 64.
struct Job {
  char* data[kSides];  // the gradient may be absent
  DType dtype[2];      // of the student, and its gradient, and of the teacher
  Access access;
  int first_axis, axes;
  int unit_width, unit_length;
  uint32_t first_unit, last_unit;  // the last is not this job's
  uint32_t units_per_row, units_per_plane, units_per_length;
  int64_t first_row;  // in the loss, or in grad_output, of several rows
  Axis row, width, length;
  double weight;       // of the squares in the loss
  double coefficient;  // of the difference in the gradient
};

// The jobs of one launch, as a parameter of the kernel.
template <int Jobs, int Axes>
struct Table {
  static constexpr int kJobs = Jobs, kAxes = Axes;
  Job jobs[Jobs];
  Axis axes[Axes];
  int count;
};

struct Plan {
  std::vector<Job> jobs;
  std::vector<Axis> axes;
  bool by_row;
  DType arithmetic;

  // Whether all pairs are of these dtypes, and the arithmetic in float32: other calls are rare, and
  // their kernels know one access for all dtypes.
  bool is_uniform;

  Plan(const Tensors& students, const Tensors& teachers, DType arithmetic, bool by_row);

  uint32_t units() const { return jobs.empty() ? 0 : jobs.back().last_unit; }
  void add(const Tensor& student, const Tensor& teacher, const Tensor& gradient, int64_t first_row,
           double weight, double coefficient);
};

// The axes of a pair, longest strides of the student first; those that are one stretch in every
// tensor are one.
inline std::vector<Axis> merged_axes(const Tensor* const (&tensors)[kSides], int first) {
  const Tensor& student = *tensors[kStudent];
  std::vector<int> order;
  for (int d = first; d < student.ndim; ++d) {
    if (student.sizes[d] == 1) continue;
    size_t place = order.size();
    while (place > 0 && student.strides[order[place - 1]] < student.strides[d]) --place;
    order.insert(order.begin() + ptrdiff_t(place), d);
  }
  std::vector<Axis> axes;
  for (int d : order) {
    Axis axis{student.sizes[d]};
    bool merges = !axes.empty();
    for (int t = 0; t < kSides; ++t) {
      axis.stride[t] = tensors[t]->strides[d];
      merges = merges && axes.back().stride[t] == axis.stride[t] * axis.size;
    }
    if (merges) {
      axis.size *= axes.back().size;
      axes.back() = axis;
    } else {
      axes.push_back(axis);
    }
  }
  return axes;
}

inline bool steps_by_vectors(const Job& job, const std::vector<Axis>& outer) {
  if (job.length.size < Vectors(size_of(job.dtype[0]), size_of(job.dtype[1])).length) return false;
  for (int t = 0; t < kSides; ++t) {
    if (job.data[t] == nullptr) continue;
    if (job.length.stride[t] != 1 || reinterpret_cast<uintptr_t>(job.data[t]) % 16) return false;
    const int64_t whole = 16 / size_of(job.dtype[t == kTeacher]);
    if (job.row.stride[t] % whole) return false;
    for (const Axis& axis : outer)
      if (axis.stride[t] % whole) return false;
  }
  return true;
}

// The axis along which the teacher lies side by side where the student does along another, or -1.
inline int crossing_axis(const Job& job, const std::vector<Axis>& outer) {
  constexpr int64_t worthwhile = 4;
  if (job.length.stride[kStudent] != 1 || job.length.stride[kTeacher] == 1) return -1;
  if (job.data[kGradient] != nullptr && job.length.stride[kGradient] != 1) return -1;
  if (job.length.size < worthwhile) return -1;
  for (size_t i = 0; i < outer.size(); ++i)
    if (outer[i].stride[kTeacher] == 1 && outer[i].size >= worthwhile) return int(i);
  return -1;
}

inline Plan::Plan(const Tensors& students, const Tensors& teachers, DType arithmetic, bool by_row)
    : by_row(by_row), arithmetic(arithmetic), is_uniform(arithmetic != DType::f64) {
  for (size_t j = 0; j < students.size(); ++j)
    is_uniform = is_uniform && students[j].dtype == students[0].dtype &&
                 teachers[j].dtype == teachers[0].dtype;
}

inline void Plan::add(const Tensor& student, const Tensor& teacher, const Tensor& gradient,
                      int64_t first_row, double weight, double coefficient) {
  if (student.numel() == 0) return;
  // An absent gradient moves with the student.
  const Tensor* const tensors[kSides] = {&student, &teacher, gradient ? &gradient : &student};
  Job job{};
  job.data[kStudent] = student.data;
  job.data[kTeacher] = teacher.data;
  job.data[kGradient] = gradient.data;
  job.dtype[0] = student.dtype;
  job.dtype[1] = teacher.dtype;
  job.first_row = first_row;
  job.weight = weight;
  job.coefficient = coefficient;
  if (by_row) {
    job.row.size = student.sizes[0];
    for (int t = 0; t < kSides; ++t) job.row.stride[t] = tensors[t]->strides[0];
  }
  std::vector<Axis> outer = merged_axes(tensors, by_row ? 1 : 0);
  const auto take = [&](size_t i) {
    const Axis axis = outer[i];
    outer.erase(outer.begin() + ptrdiff_t(i));
    return axis;
  };
  job.length = outer.empty() ? Axis{1, {1, 1, 1}} : take(outer.size() - 1);
  const int crossing = crossing_axis(job, outer);
  if (is_uniform && steps_by_vectors(job, outer)) {
    job.access = Access::vectors;
    job.unit_width = 1;
    job.unit_length = Vectors(size_of(student.dtype), size_of(teacher.dtype)).unit;
  } else if (is_uniform && crossing >= 0) {
    job.access = Access::transposed;
    job.width = take(size_t(crossing));
    job.unit_width = job.unit_length = kSquare;
  } else {
    job.access = Access::elements;
    if (!outer.empty()) job.width = take(outer.size() - 1);
    job.unit_length = int(std::min<int64_t>(job.length.size, kElements));
    job.unit_width = kElements / job.unit_length;
  }
  const auto parts = [](int64_t size, int64_t of) { return (size + of - 1) / of; };
  const int64_t per_length = parts(job.length.size, job.unit_length);
  const int64_t per_plane = parts(job.width.size, job.unit_width) * per_length;
  int64_t per_row = per_plane;
  for (const Axis& axis : outer) per_row *= axis.size;
  const int64_t last_unit = units() + job.row.size * per_row;
  if (last_unit > INT32_MAX) throw std::invalid_argument("hint_loss: too many elements for a GPU");
  job.units_per_length = uint32_t(per_length);
  job.units_per_plane = uint32_t(per_plane);
  job.units_per_row = uint32_t(per_row);
  job.first_unit = units();
  job.last_unit = uint32_t(last_unit);
  job.first_axis = int(axes.size());
  job.axes = int(outer.size());
  axes.insert(axes.end(), outer.begin(), outer.end());
  jobs.push_back(job);
}

}  // namespace fastkd::cuda
