// One row of a call whose teacher kept k classes: how its sums are found, and what follows from
// them for the gradient. The classes that no slot lists have a maximum of their own: relative to
// that of all they may underflow, and what they lack of 1 is no measure of them.
#pragma once

#include "top_k.h"

namespace fastkd::cuda::logits {

// What is known of one row, in every thread that has a part in it.
template <class A>
struct TopKRow {
  const uint32_t row;
  const Slots slots;
  const int64_t label;
  Start<kSides> start;
  Rates<A> rates;
  double temperature, inverse;  // 1 / T, as the arithmetic has it
  double squared = 1;           // what multiplies the divergence besides its weight
  // Of the classes that no slot lists, of those of the student's softmax, and of all.
  RowState<A> rest, soft, all;
  double log_sum;  // of the softmax, scaled

  __device__ __forceinline__ TopKRow(const TopKCall& of, uint32_t row)
      : row(row),
        slots(of, row),
        label(of.has_classes ? label_in_shard(of.call, row) : kNoLabels),
        rates(of.call),
        temperature(of.call.temperature),
        inverse(of.call.inverse) {
    locate(of.call, row, start.at);
    if (of.temperatures == nullptr) return;
    const double root = double(static_cast<const A*>(of.roots)[row]);
    temperature = double(static_cast<const A*>(of.temperatures)[row]);
    squared = temperature > 0 ? root * root : double(NAN);
    inverse = use_temperature(temperature, rates);
  }

  // Logarithms of probabilities, scaled: of a class by its logit, and of all that no slot lists.
  __device__ __forceinline__ double log_q(double logit) const {
    const double x = shifted(logit, double(shift(soft.student_max)));
    return at_student(x, inverse) - log_sum;
  }
  __device__ __forceinline__ double log_q_of_rest() const {
    const double apart = double(shift(rest.student_max)) - double(shift(soft.student_max));
    return apart * inverse + (log(double(rest.student)) * kLogitScale - log_sum);
  }
};

// A thread's part in a row.
template <class A, bool kIsColumns>
struct TopKPasses : ClassPasses<A, kIsColumns> {
  using Base = ClassPasses<A, kIsColumns>;
  using Base::call, Base::N;

  const TopKCall& top;

  __device__ __forceinline__ TopKPasses(const TopKCall& of, PassesShared<A>& shared,
                                        int64_t vectors)
      : Base(of.call, shared, vectors), top(of) {}

  __device__ __forceinline__ TopKRow<A> row_of(uint32_t row) const {
    TopKRow<A> of(top, row);
    of.start.phase = kIsColumns ? 0 : phase_of<N>(call, of.start.at[kStudent]);
    return of;
  }

  __device__ __forceinline__ MergeStudentLanes<A> lanes(const TopKRow<A>& of) const {
    return {of.rates, this->with_logits};
  }

  // Of the classes here that no slot lists, or of all where the student's softmax is one of the
  // slots; the logits are of all in either case.
  __device__ __forceinline__ RowState<A> unlisted_sums(const TopKRow<A>& of) const {
    SlotCursor cursor(of.slots);
    const auto reader = this->reader(call.sides[kStudent], of.start.at[kStudent], of.start.phase);
    return this->template sums_of<true>(
        reader, of.start.phase, of.rates, lanes(of), [&](int64_t i) {
          unsigned listed = 0;
          if (!top.listed_only)
            cursor.over(i, i + N, [&](int64_t, int64_t at) { listed |= 1u << int(at - i); });
          return listed;
        });
  }
};

// What the gradient of a class is made of, besides the terms of its slots: exponentials relative to
// a maximum, at the temperature and at 1.
template <class A>
struct ClassFactors {
  A shift, soft, hard;

  __device__ __forceinline__ A of(A logit, const Rates<A>& rates, A smoothing) const {
    const A x = shifted(logit, shift);
    const A g = rates.exp_soft(x) * soft - smoothing;
    return rates.has_hard ? g + rates.exp_hard(x) * hard : g;
  }
};

// One thread finds these, because arithmetic in float64 is slow on many chips.
template <class A>
struct RowGradient {
  Weights<A> by;
  ClassFactors<A> listed, rest;
  A nothing;   // the gradient of a class without a part in the loss
  double psi;  // the sum over slots and the rest

  RowGradient() = default;
  __device__ __forceinline__ RowGradient(const TopKCall& of, const TopKRow<A>& row, double divisor,
                                         double psi, double psi_rest, double log_q_rest)
      : by(weights_of(of.call, row, divisor)), psi(psi) {
    const bool is_wrong = row.slots.indices[row.slots.count - 1] >= of.all_classes;
    nothing = is_wrong && by.soft != 0 ? A(NAN) : A(0);
    const A hard_sum = row.rates.has_hard ? row.all.hard : row.all.student;
    const double hard = by.hard == 0 ? 0 : double(by.hard) / double(hard_sum);
    const bool has_hard = row.rates.has_hard;
    listed = {shift(row.all.student_max), A(has_hard ? 0 : hard), A(has_hard ? hard : 0)};
    rest = listed;
    if (of.listed_only) return;
    const double soft = double(by.soft), sum = double(row.rest.student);
    const double q = exp(log_q_rest / kLogitScale);
    if (by.soft != 0) listed.soft += A(-soft * psi / double(row.soft.student));
    rest = {shift(row.rest.student_max), 0, 0};
    if (sum == 0) return;
    if (by.soft != 0) rest.soft = A(soft * (psi_rest - q * psi) / sum);
    if (by.hard == 0) return;
    if (has_hard)
      rest.hard = A(hard) * row.rates.hard(row.rest.student_max, row.all.student_max);
    else
      rest.soft += A(double(by.hard) * q / sum);
  }

 private:
  __device__ __forceinline__ static Weights<A> weights_of(const Call& call, const TopKRow<A>& row,
                                                          double divisor) {
    const double by = double(grad_output_of<A>(call, row.row));
    Weights<A> weights(call, divisor, by);
    weights.soft = A(weighted(call.soft_weight, row.squared / row.temperature) / divisor * by);
    if (row.label == kWrongLabel) weights.smoothing = A(NAN);
    return weights.of_shard(call);
  }
};

}  // namespace fastkd::cuda::logits
