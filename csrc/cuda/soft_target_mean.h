// A call whose target is the mean of several teachers' probabilities, p = Σ w e / Z, and what its
// kernels find of a row.
//
// A sum of p that starts at −0 stays −0 as long as all that is added to it is: so the sign tells a
// class that every teacher excludes from one whose probability underflows.
#pragma once

#include "soft_target_row.h"

namespace fastkd::cuda::logits {

constexpr int kMostTeachers = 64;
constexpr int kMostAxes = 32;  // of two rows or more each, and rows are counted in 32 bits

struct Teacher {
  Tensor tensor;
  double weight;
};

// Rows are those of `call`, which knows nothing of the teachers.
struct MeanCall {
  Call call;
  // kLogitScale and log2(e) / T, times a power of 2 by which neither is above 2.
  double of_logarithm, of_logit;
  bool have_one_dtype;  // the teachers and the student
  int count;
  Teacher teachers[kMostTeachers];
  int64_t row_stride[kMostAxes][kMostTeachers];
};

// f(a divergence, a null pointer of the storage type of all tensors, or of Any).
template <class F>
auto with_type_of(const MeanCall& of, const F& f) {
  return with_divergence(of.call.divergence, [&](auto divergence) {
    if (!of.have_one_dtype) return f(divergence, static_cast<Any*>(nullptr));
    return with_storage(of.call.sides[kStudent].dtype,
                        [&](auto* storage) { return f(divergence, storage); });
  });
}

template <class A>
struct MeanRates : Rates<A> {
  A of_logarithm, of_logit;

  __device__ explicit MeanRates(const MeanCall& of)
      : Rates<A>(of.call), of_logarithm(A(of.of_logarithm)), of_logit(A(of.of_logit)) {}

  // A teacher's exponential, and −0 of a class that it excludes.
  __device__ __forceinline__ A of_teacher(A y) const {
    return y == A(-INFINITY) ? A(-0.0) : this->exp_soft(y);
  }
};

__device__ __forceinline__ int64_t start_of_teacher(const MeanCall& of, uint32_t row, int m) {
  int64_t at = 0;
#pragma unroll 1
  for (int a = of.call.axes - 1; a >= 0; --a) {
    const uint32_t size = of.call.axis[a].size;
    const uint32_t outer = a == 0 ? 0 : row / size;
    at += (row - outer * size) * of.row_stride[a][m];
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

// One tensor at a time is found, in `student_max` and `student`. The state of a row, where the
// tensor is the student's, has in `teacher` the sum of p, which are relative to no maximum, and in
// `difference` that of terms with of_logarithm · log2 p − of_logit · (s − student_max), s scaled.
template <class A>
struct MergeTeacherLanes {
  const MeanRates<A>& rates;

  template <int kLanes>
  __device__ __forceinline__ void over(RowState<A>& row) const {
    move(row, over_lanes_max<kLanes>(row.student_max));
    over_lanes_sum<kLanes>(row.student);
  }
  __device__ __forceinline__ void move(RowState<A>& row, A to) const {
    row.student *= rates.soft(row.student_max, to);
    row.student_max = to;
  }
};
template <class D, class A>
struct MergeMeanLanes {
  const MeanRates<A>& rates;
  bool with_logits;

  template <int kLanes>
  __device__ __forceinline__ void over(RowState<A>& row) const {
    move(row, over_lanes_max<kLanes>(row.student_max));
    add_over_lanes<kLanes>(row, rates.has_hard, with_logits);
  }
  __device__ __forceinline__ void move(RowState<A>& row, A to) const {
    const A by = rates.soft(row.student_max, to);
    row.difference += (D::kByTeacher ? row.teacher : row.student) * rates.of_logit *
                      (shift(to) - shift(row.student_max));
    if (!D::kByTeacher) row.difference *= by;
    row.student *= by;
    if (rates.has_hard) row.hard *= rates.hard(row.student_max, to);
    row.student_max = to;
  }
};

// Adds p of a class and its term, of the student's logit relative to its maximum; returns what is
// kept of the class. One that a side alone excludes is infinite, also where its probability on the
// other side underflows.
template <class D, class A>
__device__ __forceinline__ A add_mean(RowState<A>& row, A es, A p, A x, const MeanRates<A>& rates) {
  row.teacher += p;
  const bool counts = p > 0;
  // Of any number: a branch around the logarithm would take more instructions than it saves.
  const A apart = log2(counts ? p : A(1)) * rates.of_logarithm - x * rates.of_logit;
  const A kept = counts ? D::kept(es, p, apart) : p;
  const bool is_infinite =
      D::kByTeacher ? x == A(-INFINITY) && !signbit(p) : x != A(-INFINITY) && signbit(p);
  row.difference += counts        ? D::term(es, kept, apart)
                    : is_infinite ? A(D::kByTeacher ? INFINITY : -INFINITY)
                                  : A(0);
  return kept;
}

// The factors of a gradient. p needs no divisor but its rounding.
template <class D, class A>
__device__ __forceinline__ RowFactors<A> factors_of(const Call& call, RowState<A> state,
                                                    const Rates<A>& rates,
                                                    const Weights<A>& weights, int64_t label) {
  state.teacher = 1;
  return RowFactors<A>(D(), state, call.inverse, rates, weights, label);
}

}  // namespace fastkd::cuda::logits
