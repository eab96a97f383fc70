// Soft targets and hard labels: a call as its kernels see it, what they find of a row, and what
// they make of that.
#pragma once

#include <cmath>

#include "../soft_target.h"
#include "reduce.h"
#include "storage.h"

namespace fastkd::cuda {

namespace logits {

enum Side { kStudent, kTeacher, kToStudent, kToTeacher, kSides };

struct Tensor {
  char* data;  // the gradients may be absent
  DType dtype;
  int64_t class_stride;  // in elements, like all strides
};

struct Axis {
  uint32_t size;
  int64_t stride[kSides];
};

// Rows are the indices along the axes, in C order. They are counted in 32 bits, which divide many
// times as fast as 64.
struct Call {
  Tensor sides[kSides];
  int64_t classes;
  double share;     // of each class, in an even distribution
  bool is_dense;    // a row's classes lie side by side in every tensor,
  bool is_aligned;  // and every row begins where an access of 16 bytes may
  uint32_t rows;
  int axes;
  Axis axis[kMaxDims];
  const int64_t* labels;  // one a row, or absent
  int64_t ignore_index;
  Reduction reduction;
  double temperature, soft_weight, hard_weight, smoothing;
  float binary;    // log2(e) / T, of scaled logits
  double inverse;  // 1 / T, as `binary` has it unless the arithmetic is double

  void* loss;                      // absent in a backward call of ensembles
  void* statistics;                // or absent
  void* parts;                     // of the loss, or absent
  double* partial;                 // (KL, cross-entropy) of each block
  const unsigned long long* kept;  // rows that count, where they were counted before; or absent

  const void* grad_output;  // backward's: one number, or one a row
  bool in_place;            // the gradient is that for a grad_output of 1
};

// exp2, within 2 ulp; what would leave float's normal range is 0.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0 : std::exp2(x);
#endif
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

constexpr double kBinary = 1.4426950408889634;  // log2(e)

// exp(x / T) and exp(x), for scaled x of 0 and below.
template <class A>
struct Rates {
  A softened, sharp;
  bool third;  // whether these are two

  __device__ explicit Rates(const Call& call)
      : softened(sizeof(A) == 8 ? A(kBinary / call.temperature / kLogitScale) : A(call.binary)),
        sharp(A(kBinary / kLogitScale)),
        third(call.labels != nullptr && call.temperature != 1) {}
};

// The maximum to subtract, scaled: where every class is excluded, 0 leaves exp(-inf) = 0.
template <class A>
__device__ __forceinline__ A shift(A maximum) {
  return maximum == A(-INFINITY) ? A(0) : maximum * A(kLogitScale);
}

// A logit less the maximum, scaled.
template <class A>
__device__ __forceinline__ A shifted(A logit, A shift) {
  return logit * A(kLogitScale) - shift;
}

// exp2(rate · (from − to)), these scaled: what moves exponentials from one maximum to another.
template <class A>
__device__ __forceinline__ A moving(A from, A to, A rate) {
  return from == to             ? A(1)
         : from == A(-INFINITY) ? A(0)
                                : exp2_of(shifted(from, to * A(kLogitScale)) * rate);
}

// What a part of a row amounts to, relative to its own maxima.
template <class A>
struct alignas(kAccess) Sums {
  A student_max = A(-INFINITY), teacher_max = A(-INFINITY);
  A student = 0, teacher = 0, hard = 0;  // of exponentials; the last one where they are three
  A difference = 0;                      // Σ et · ((t − t_max) − (s − s_max)), scaled
  double logits = 0;                     // Σ s, scaled, for label smoothing

  // Relative to other maxima, which are no smaller.
  __device__ __forceinline__ void move(A to_student, A to_teacher, const Rates<A>& rates) {
    const A by = moving(student_max, to_student, rates.softened);
    const A t_by = moving(teacher_max, to_teacher, rates.softened);
    const A apart =
        (shift(teacher_max) - shift(to_teacher)) - (shift(student_max) - shift(to_student));
    // An infinite difference stays so, whatever the mass of its class.
    difference = t_by == 0 ? (difference < A(INFINITY) ? A(0) : difference)
                           : t_by * (difference + (teacher == 0 ? A(0) : teacher * apart));
    student *= by;
    teacher *= t_by;
    if (rates.third) hard *= moving(student_max, to_student, rates.sharp);
    student_max = to_student;
    teacher_max = to_teacher;
  }

  // Adds others, relative to the same maxima.
  __device__ __forceinline__ void take(const Sums& other) {
    student += other.student;
    teacher += other.teacher;
    hard += other.hard;
    difference += other.difference;
    logits += other.logits;
  }

  // f(of each sum), all relative to the same maxima.
  template <class F>
  __device__ __forceinline__ void each(const Rates<A>& rates, bool smooths, const F& f) {
    f(student);
    f(teacher);
    f(difference);
    if (rates.third) f(hard);
    if (smooths) f(logits);
  }
};

// Over groups of so many lanes, in every lane.
template <int kLanes, class A>
__device__ __forceinline__ A over_lanes_max(A x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

template <int kLanes, class A>
__device__ __forceinline__ void add_over_lanes(Sums<A>& sums, const Rates<A>& rates, bool smooths) {
  sums.each(rates, smooths, [](auto& x) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  });
}

// One lane's part and the others', which are relative to maxima of their own.
template <int kLanes, class A>
__device__ __forceinline__ void merge_over_lanes(Sums<A>& sums, const Rates<A>& rates,
                                                 bool smooths) {
  const A student_max = over_lanes_max<kLanes>(sums.student_max);
  sums.move(student_max, over_lanes_max<kLanes>(sums.teacher_max), rates);
  add_over_lanes<kLanes>(sums, rates, smooths);
}

// What N classes add to the sums of one thread, whose maxima they may raise. Those outside of
// [first, last) are not in the row, and excluded by both sides.
template <class A, int N>
__device__ __forceinline__ void add(Sums<A>& sums, const A (&s)[N], const A (&t)[N], int64_t first,
                                    int64_t last, const Rates<A>& rates, bool smooths) {
  A s_max = sums.student_max, t_max = sums.teacher_max;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    s_max = s[k] > s_max ? s[k] : s_max;
    t_max = t[k] > t_max ? t[k] : t_max;
  }
  if (s_max > sums.student_max || t_max > sums.teacher_max) sums.move(s_max, t_max, rates);
  const A s_shift = shift(s_max), t_shift = shift(t_max);
  // By themselves first: a sum of few rounds less.
  Sums<A> these;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const A x = shifted(s[k], s_shift), y = shifted(t[k], t_shift);
    const A et = exp2_of(y * rates.softened);
    these.student += exp2_of(x * rates.softened);
    these.teacher += et;
    if (y != A(-INFINITY)) these.difference += et * (y - x);
    if (rates.third) these.hard += exp2_of(x * rates.sharp);
    if (smooths && k >= first && k < last) these.logits += double(s[k] * A(kLogitScale));
  }
  sums.take(these);
}

// The class of a row's label, or what there is in its place.
constexpr int64_t kNoLabels = -1, kWrongLabel = -2;

__device__ __forceinline__ int64_t label_of(const Call& call, uint32_t row) {
  if (call.labels == nullptr) return kNoLabels;
  const int64_t label = call.labels[row];
  return label >= 0 && label < call.classes ? label : kWrongLabel;
}

// The divergence and the cross-entropy of a row, scaled.
struct Losses {
  double kl, ce;
};

template <class A>
__device__ Losses losses_of(const Sums<A>& row, const Rates<A>& rates, const Call& call,
                            int64_t label, double label_logit) {
  // 0 · inf of a class that only the student excludes, and whose probability underflows.
  const bool is_infinite =
      isnan(row.difference) && !isnan(row.student) && !isnan(row.teacher) && row.teacher > 0;
  const double difference = is_infinite ? double(INFINITY) : double(row.difference);
  const double kl = difference / double(row.teacher) * call.inverse +
                    log(double(row.student) / double(row.teacher)) * kLogitScale;
  Losses losses{kl < 0 ? 0 : kl, 0};  // rounding may leave a tiny negative number
  if (label == kNoLabels) return losses;
  // Logits are compared with one another first: beside a large one the logarithm has no digits.
  const double log_sum = log(double(rates.third ? row.hard : row.student)) * kLogitScale;
  const double top = double(row.student_max) * kLogitScale, smoothing = call.smoothing;
  // A part of weight 0 may be infinite.
  if (smoothing < 1) losses.ce += (1 - smoothing) * (log_sum + (top - label_logit * kLogitScale));
  if (smoothing > 0) losses.ce += smoothing * (log_sum + (top - row.logits * call.share));
  if (label == kWrongLabel) losses.ce = double(NAN);
  return losses;
}

// The weights of a gradient's terms, for a grad_output.
template <class A>
struct Weights {
  A soft, hard, smoothing, label;

  Weights() = default;
  __device__ Weights(const Call& call, double divisor, double grad_output) {
    const double by = grad_output / divisor;
    const double to_hard = call.labels == nullptr ? 0 : call.hard_weight * by;
    soft = A(call.soft_weight / call.temperature * by);
    hard = A(to_hard);
    smoothing = A(to_hard * call.smoothing / double(call.classes));
    label = A(to_hard * (1 - call.smoothing));
  }
};

// A gradient is a·es − b·et + c·eh − d, and less at the label.
template <class A>
struct Factors {
  A student, teacher, hard, smoothing, label;
  bool soft, any;  // whether the teacher counts, and whether anything does

  Factors() = default;
  __device__ __forceinline__ Factors(const Sums<A>& row, const Rates<A>& rates,
                                     const Weights<A>& weights)
      : student(weights.soft / row.student),
        teacher(weights.soft / row.teacher),
        hard(0),
        smoothing(weights.smoothing),
        label(weights.label),
        soft(weights.soft != 0),
        any(soft || weights.hard != 0) {
    if (rates.third)
      hard = weights.hard / row.hard;
    else
      student += weights.hard / row.student;
  }

  // For exponentials relative to other maxima than the row's.
  __device__ __forceinline__ void move(A student_max, A teacher_max, const Sums<A>& row,
                                       const Rates<A>& rates) {
    student *= moving(student_max, row.student_max, rates.softened);
    teacher *= moving(teacher_max, row.teacher_max, rates.softened);
    if (rates.third) hard *= moving(student_max, row.student_max, rates.sharp);
  }
};

// The gradient of one class, of logits relative to the row's maxima, scaled.
template <class A>
__device__ __forceinline__ A gradient_of(const Factors<A>& by, A x, A y, const Rates<A>& rates,
                                         bool is_label) {
  if (!by.any) return 0;
  A g = exp2_of(x * rates.softened) * by.student - by.smoothing;
  if (by.soft) g -= exp2_of(y * rates.softened) * by.teacher;
  if (rates.third) g += exp2_of(x * rates.sharp) * by.hard;
  return is_label ? g - by.label : g;
}

// Where the elements of a row begin.
template <int N>
__device__ __forceinline__ void locate(const Call& call, uint32_t row, int64_t (&at)[N]) {
#pragma unroll
  for (int side = 0; side < N; ++side) at[side] = 0;
#pragma unroll 1
  for (int a = call.axes - 1; a >= 0; --a) {
    const Axis& axis = call.axis[a];
    const uint32_t outer = a == 0 ? 0 : row / axis.size, i = row - outer * axis.size;
#pragma unroll
    for (int side = 0; side < N; ++side) at[side] += i * axis.stride[side];
    row = outer;
  }
}

__device__ __forceinline__ bool ignores(const Call& call, uint32_t row) {
  return call.labels != nullptr && call.labels[row] == call.ignore_index;
}

// The rows that count, in every thread of the block; `warps` is as block_sum has it.
__device__ __forceinline__ double kept_rows(const Call& call, double* warps) {
  if (call.labels == nullptr) return call.rows;
  if (call.kept != nullptr) return double(*call.kept);
  unsigned kept = 0;
#pragma unroll 4
  for (uint32_t row = threadIdx.x; row < call.rows; row += blockDim.x) kept += !ignores(call, row);
  const double sum = block_sum(kept, warps);
  __syncthreads();
  return sum;
}

__device__ __forceinline__ double divisor_of(const Call& call, double kept) {
  const double divisor = call.reduction == Reduction::batchmean ? kept
                         : call.reduction == Reduction::mean    ? kept * double(call.classes)
                                                                : 1;
  return divisor > 0 ? divisor : 1;
}

// The loss of a row, or of all. Weighted it may be representable where its terms are not.
template <class A>
__device__ __forceinline__ A loss_of(const Call& call, const Losses& losses) {
  return A((weighted(call.soft_weight, losses.kl) + weighted(call.hard_weight, losses.ce)) /
           kLogitScale);
}

template <class A>
__device__ void write_losses(const Call& call, uint32_t row, const Losses& losses) {
  if (call.reduction == Reduction::none && call.loss != nullptr)
    static_cast<A*>(call.loss)[row] = loss_of<A>(call, losses);
}

// Writes what is asked for of one row; an ignored one has no sums.
template <class A>
__device__ void write_row(const Call& call, uint32_t row, const Sums<A>& sums,
                          const Losses& losses) {
  write_losses<A>(call, row, losses);
  if (call.statistics == nullptr) return;
  A* to = static_cast<A*>(call.statistics) + int64_t(row) * kCount;
  to[kStudentMax] = sums.student_max;
  to[kStudentSum] = sums.student;
  to[kTeacherMax] = sums.teacher_max;
  to[kTeacherSum] = sums.teacher;
  to[kHardSum] = call.temperature == 1 ? sums.student : sums.hard;
  to[kKl] = A(losses.kl);
  to[kCe] = A(losses.ce);
}

// Adds up what the threads of all blocks have found, and writes the loss and its parts.
template <class A>
__device__ void write_loss(const Call& call, Losses total, double kept, const Tickets& tickets,
                           double* warps, bool& is_last) {
  const auto over_block = [&](Losses x) {
    x.kl = block_sum(x.kl, warps);
    __syncthreads();
    x.ce = block_sum(x.ce, warps);
    __syncthreads();
    return x;
  };
  const bool is_reduced = call.reduction != Reduction::none && call.loss != nullptr;
  if (!is_reduced && call.parts == nullptr) return;
  total = over_block(total);
  if (threadIdx.x == 0) {
    call.partial[2 * blockIdx.x] = total.kl;
    call.partial[2 * blockIdx.x + 1] = total.ce;
  }
  if (!is_last_block(tickets, is_last)) return;
  total = {0, 0};
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    total.kl += call.partial[2 * block];
    total.ce += call.partial[2 * block + 1];
  }
  total = over_block(total);
  if (threadIdx.x != 0) return;
  const double divisor = divisor_of(call, kept);
  total = {total.kl / divisor, total.ce / divisor};
  if (is_reduced) *static_cast<A*>(call.loss) = loss_of<A>(call, total);
  if (call.parts == nullptr) return;
  A* const parts = static_cast<A*>(call.parts);
  parts[0] = A(total.ce / kLogitScale);
  parts[1] = A(weighted(call.temperature * call.temperature, total.kl) / kLogitScale);
  parts[2] = A(kept);
}

}  // namespace logits
}  // namespace fastkd::cuda
