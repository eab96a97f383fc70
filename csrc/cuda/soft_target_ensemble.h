// A student and several teachers: a call as its kernels see it, what they find of a row, and what
// they make of that.
//
// The target is p = Σ w e / Z over the teachers. A sum of p that starts at −0 stays −0 as long as
// all that is added to it is: so the sign tells a class that every teacher excludes from one whose
// probability underflows.
#pragma once

#include "soft_target_forms.h"

namespace fastkd::cuda::logits {

constexpr int kMostTeachers = 64;
constexpr int kMostAxes = 32;  // of two rows or more each, and rows are counted in 32 bits

struct Teacher {
  Tensor tensor;
  double weight;
};

// Rows are those of `call`, which knows nothing of the teachers. Its inverse is what makes a
// divergence of `difference` (see Part).
struct Ensemble {
  Call call;
  // kLogitScale and log2(e) / T, times a power of 2 by which neither is above 2.
  double of_logarithm, of_logit;
  int count;
  Teacher teachers[kMostTeachers];
  int64_t row_stride[kMostAxes][kMostTeachers];
};

__device__ __forceinline__ int64_t start_of_teacher(const Ensemble& ensemble, uint32_t row, int m) {
  const Call& call = ensemble.call;
  int64_t at = 0;
#pragma unroll 1
  for (int a = call.axes - 1; a >= 0; --a) {
    const uint32_t size = call.axis[a].size;
    const uint32_t outer = a == 0 ? 0 : row / size;
    at += (row - outer * size) * ensemble.row_stride[a][m];
    row = outer;
  }
  return at;
}

// How many elements before its row a student's first vector begins: teachers, whose rows are as
// often as not where the student's are, have theirs in the same classes.
template <int N>
__device__ __forceinline__ int phase_of(const Call& call, int64_t at) {
  if (call.is_aligned || !call.is_dense) return 0;
  const Tensor& student = call.sides[kStudent];
  const int64_t size = size_of(student.dtype);
  return int((reinterpret_cast<uintptr_t>(student.data) + at * size) / size % N);
}

// Whether a row's vectors lie where accesses of 16 bytes may.
__device__ __forceinline__ bool is_aligned(const Tensor& tensor, int64_t at, int phase) {
  return tensor.class_stride == 1 &&
         (reinterpret_cast<uintptr_t>(tensor.data) + (at - phase) * size_of(tensor.dtype)) %
                 kAccess ==
             0;
}

// What a part of a row amounts to: of one tensor, relative to its own maximum, and with the
// student's what there is of the loss.
template <class A>
struct alignas(kAccess) Part {
  A maximum = A(-INFINITY), sum = 0, hard = 0;
  A mass = 0;         // Σ p
  A difference = 0;   // Σ p · (of_logarithm · log2 p − of_logit · (s − maximum)), s scaled
  double logits = 0;  // Σ s, scaled, for label smoothing

  // Relative to another maximum, which is no smaller.
  template <bool kIsStudent>
  __device__ __forceinline__ void move(A to, const Rates<A>& rates, A of_logit) {
    sum *= moving(maximum, to, rates.softened);
    if (kIsStudent) {
      if (rates.third) hard *= moving(maximum, to, rates.sharp);
      difference += mass * of_logit * (shift(to) - shift(maximum));
    }
    maximum = to;
  }
};

// One lane's part and the others', which are relative to maxima of their own.
template <int kLanes, bool kIsStudent, class A>
__device__ __forceinline__ void merge_over_lanes(Part<A>& part, const Rates<A>& rates, A of_logit,
                                                 bool smooths) {
  const A maximum = over_lanes_max<kLanes>(part.maximum);
  part.template move<kIsStudent>(maximum, rates, of_logit);
  const auto add = [](auto& x) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  };
  add(part.sum);
  if constexpr (kIsStudent) {
    if (rates.third) add(part.hard);
    add(part.mass);
    add(part.difference);
    if (smooths) add(part.logits);
  }
}

// A teacher's exponential, and −0 of a class that it excludes.
template <class A>
__device__ __forceinline__ A signed_exp2(A y, A rate) {
  return y == A(-INFINITY) ? A(-0.0) : exp2_of(y * rate);
}

// What one class adds to a difference. One that the student alone excludes is infinite, also where
// its probability underflows.
template <class A>
__device__ __forceinline__ A difference_of(A p, A x, A of_logarithm, A of_logit) {
  if (p > 0) return p * (log2(p) * of_logarithm - x * of_logit);
  return x == A(-INFINITY) && !signbit(p) ? A(INFINITY) : A(0);
}

// A row as `losses_of` and `Factors` take it; p needs no divisor but its rounding.
template <class A>
__device__ __forceinline__ Sums<A> as_sums(const Part<A>& part, A mass) {
  Sums<A> sums;
  sums.student_max = part.maximum;
  sums.teacher_max = 0;
  sums.student = part.sum;
  sums.teacher = mass;
  sums.hard = part.hard;
  sums.difference = part.difference;
  sums.logits = part.logits;
  return sums;
}

// The weights for a row's own grad_output.
template <class A>
__device__ __forceinline__ Weights<A> weights_of(const Call& call, uint32_t row,
                                                 Weights<A> weights) {
  if (call.grad_output == nullptr) return weights;
  const A by = static_cast<const A*>(
      call.grad_output)[call.reduction == Reduction::none ? row : uint32_t(0)];
  weights.soft *= by;
  weights.hard *= by;
  weights.smoothing *= by;
  weights.label *= by;
  return weights;
}

// The gradient of one class, of its exponentials and its p.
template <class A>
__device__ __forceinline__ A gradient_of(const Factors<A>& by, A es, A p, A eh, bool third,
                                         bool is_label) {
  A g = es * by.student - by.smoothing;
  if (by.soft) g -= p * by.teacher;
  if (third) g += eh * by.hard;
  if (is_label) g -= by.label;
  return by.any ? g : A(0);
}

// Rows that stay on the chip, of float32 arithmetic; returns whether it has served the call.
bool launch_ensemble_rows(const Ensemble& ensemble, const Scratch& scratch, const Stream& stream);

}  // namespace fastkd::cuda::logits
