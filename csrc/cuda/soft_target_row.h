// The state of a row and the factors of its gradient (see ../row.h), as threads find them and put
// them together.
#pragma once

#include "soft_target.h"

namespace fastkd::cuda::logits {

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
__device__ __forceinline__ void over_lanes_sum(A& x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
}

// States that are relative to the same maxima; with the sum of logits or without.
template <int kLanes, class A>
__device__ __forceinline__ void add_over_lanes(RowState<A>& row, bool has_hard, bool with_logits) {
  over_lanes_sum<kLanes>(row.student);
  over_lanes_sum<kLanes>(row.teacher);
  over_lanes_sum<kLanes>(row.difference);
  if (has_hard) over_lanes_sum<kLanes>(row.hard);
  if (with_logits) over_lanes_sum<kLanes>(row.logits);
}

// Merges the states of lanes, which are relative to maxima of their own.
template <class D, class A>
struct MergeLanes {
  const Rates<A>& rates;
  bool with_logits;

  template <int kLanes>
  __device__ __forceinline__ void over(RowState<A>& row) const {
    const A student_max = over_lanes_max<kLanes>(row.student_max);
    row.template move<D>(student_max, over_lanes_max<kLanes>(row.teacher_max), rates);
    add_over_lanes<kLanes>(row, rates.has_hard, with_logits);
  }
};

// Of a kernel whose blocks have a row each.
constexpr int kBlockRowThreads = 256;
template <class A>
struct BlockShared {
  RowState<A> of_warps[kBlockRowThreads / kWarp];
  LossShared<kBlockRowThreads / kWarp> losses;
};

// The block's state from each thread's, in every thread.
template <class A, class Merge>
__device__ __forceinline__ void merge_over_block(RowState<A>& row, RowState<A>* of_warps,
                                                 const Merge& merge) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  merge.template over<kWarp>(row);
  if (lane == 0) of_warps[warp] = row;
  __syncthreads();
  row = RowState<A>();
  if (lane < int(blockDim.x) / kWarp) row = of_warps[lane];
  merge.template over<kWarp>(row);
  __syncthreads();
}

// Adds a class, of logits relative to the row's maxima and of their exponentials at the
// temperature; returns what is kept of it.
template <class D, class A>
__device__ __forceinline__ A add_class(RowState<A>& row, A x, A y, A es, A et) {
  const A kept = D::kept(es, et, y - x);
  row.student += es;
  row.teacher += et;
  if ((D::kByTeacher ? y : x) != A(-INFINITY)) row.difference += D::term(es, kept, y - x);
  return kept;
}

// Adds N classes to the state of one thread, whose maxima they may raise. Classes outside of
// [first, last) are not in the row, and excluded by both sides.
template <class D, class A, int N>
__device__ __forceinline__ void add(RowState<A>& row, const A (&s)[N], const A (&t)[N],
                                    int64_t first, int64_t last, const Rates<A>& rates,
                                    bool with_logits) {
  A s_max = row.student_max, t_max = row.teacher_max;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    s_max = s[k] > s_max ? s[k] : s_max;
    t_max = t[k] > t_max ? t[k] : t_max;
  }
  if (s_max > row.student_max || t_max > row.teacher_max) row.template move<D>(s_max, t_max, rates);
  const A s_shift = shift(s_max), t_shift = shift(t_max);
  // A partial sum of their own takes part in fewer roundings.
  RowState<A> these;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const A x = shifted(s[k], s_shift), y = shifted(t[k], t_shift);
    add_class<D>(these, x, y, rates.exp_soft(x), rates.exp_soft(y));
    if (rates.has_hard) these.hard += rates.exp_hard(x);
    if (with_logits && k >= first && k < last) these.logits += double(s[k] * A(kLogitScale));
  }
  row.take(these);
}

// Of a row of which `label_logit` is known, and whose sum of logits is of so many classes.
template <class A>
__device__ double cross_entropy_of(const RowState<A>& row, const Rates<A>& rates, const Call& call,
                                   int64_t label, double label_logit, int64_t classes) {
  if (label == kNoLabels) return 0;
  // Multiplied by 1 / K, and what that is off by. The mean of equal logits is then their value, to
  // the last bit of a large one; beside an infinite mean there is no rest.
  double mean = row.logits * call.share;
  const double rest = fma(-mean, double(classes), double(row.logits));
  if (!isnan(rest)) mean = fma(rest, call.share, mean);
  return label == kWrongLabel
             ? double(NAN)
             : cross_entropy(log(double(rates.has_hard ? row.hard : row.student)) * kLogitScale,
                             double(row.student_max) * kLogitScale, label_logit * kLogitScale, mean,
                             call.smoothing);
}
template <class A>
__device__ double cross_entropy_of(const RowState<A>& row, const Rates<A>& rates, const Call& call,
                                   int64_t label, double label_logit) {
  return cross_entropy_of(row, rates, call, label, label_logit, call.classes);
}
template <class D, class A>
__device__ Losses losses_of(RowState<A> row, const Rates<A>& rates, const Call& call, int64_t label,
                            double label_logit) {
  // 0 · inf of a class that one side excludes, and whose probability underflows on the other.
  if (isnan(row.difference) && !isnan(row.student) && !isnan(row.teacher) &&
      (D::kByTeacher ? row.teacher : row.student) > 0)
    row.difference = D::kByTeacher ? A(INFINITY) : A(-INFINITY);
  return {divergence_of<D>(row, call.inverse),
          cross_entropy_of(row, rates, call, label, label_logit)};
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

  // With label smoothing over the classes of all shards.
  __device__ __forceinline__ Weights of_shard(const Call& call) const {
    Weights of = *this;
    if (call.all_classes != 0) of.smoothing *= A(double(call.classes) / double(call.all_classes));
    return of;
  }

  __device__ __forceinline__ Weights times(A by) const {
    Weights of;
    of.soft = soft * by;
    of.hard = hard * by;
    of.smoothing = smoothing * by;
    of.label = label * by;
    return of;
  }
};

// The row's own, or the one for all.
template <class A>
__device__ __forceinline__ A grad_output_of(const Call& call, uint32_t row) {
  if (call.grad_output == nullptr) return 1;
  return static_cast<const A*>(
      call.grad_output)[call.reduction == Reduction::none ? row : uint32_t(0)];
}

// And whether anything counts.
template <class A>
struct RowFactors : Factors<A> {
  bool any;

  RowFactors() = default;
  template <class D, class R>
  __device__ __forceinline__ RowFactors(D, const RowState<A>& row, double mean, double inverse,
                                        const R& rates, const Weights<A>& weights,
                                        int64_t label = kNoLabels) {
    const auto by = D::factors(weights.soft, row.student, row.teacher, A(mean), A(inverse));
    this->student = by.student;
    this->teacher = by.teacher;
    this->hard = 0;
    this->smoothing = label == kWrongLabel ? A(NAN) : weights.smoothing;
    this->label = weights.label;
    this->soft = weights.soft != 0;
    this->has_hard = rates.has_hard;
    any = this->soft || weights.hard != 0;
    if (rates.has_hard)
      this->hard = weights.hard / row.hard;
    else
      this->student += weights.hard / row.student;
  }

  template <class D, class R>
  __device__ __forceinline__ RowFactors(D divergence, const RowState<A>& row, double inverse,
                                        const R& rates, const Weights<A>& weights,
                                        int64_t label = kNoLabels)
      : RowFactors(divergence, row, mean_of<D>(row, inverse), inverse, rates, weights, label) {}

  // For exponentials relative to other maxima than the row's; `unit` is that of what is between the
  // sides.
  template <class D, class R>
  __device__ __forceinline__ void move(A student_max, A teacher_max, const RowState<A>& row,
                                       const R& rates, A unit = 1) {
    const auto by = D::moved(
        SoftFactors<A>{this->student, this->teacher}, rates.soft(student_max, row.student_max),
        rates.soft(teacher_max, row.teacher_max),
        unit * moved_apart(student_max, row.student_max, teacher_max, row.teacher_max, rates));
    this->student = by.student;
    this->teacher = by.teacher;
    if (rates.has_hard) this->hard *= rates.hard(student_max, row.student_max);
  }

  // The gradient of a class from what was kept of it, or from its logits relative to the maxima.
  template <class D>
  __device__ __forceinline__ A of_kept(A es, A kept, A eh, bool is_label) const {
    const A g = this->template gradient<D>(es, kept, eh);
    return !any ? A(0) : is_label ? g - this->label : g;
  }
  template <class D>
  __device__ __forceinline__ A of_logits(A x, A y, const Rates<A>& rates, bool is_label) const {
    if (!any) return 0;
    const A es = rates.exp_soft(x);
    const A kept = this->soft ? D::kept(es, rates.exp_soft(y), y - x) : A(0);
    return of_kept<D>(es, kept, rates.has_hard ? rates.exp_hard(x) : A(0), is_label);
  }
};

}  // namespace fastkd::cuda::logits
