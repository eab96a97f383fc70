// The arithmetic of rows that are held on the chip, in two units. Rounded: an exponent is
// rate · logit − origin, one instruction a class; an origin is rate · maximum, rounded once, and
// parts of a row are compared by the rounded ones, so that the rounding cancels. Exact: that of
// Rates, which takes one instruction more and serves any row.
#pragma once

#include <cfloat>

#include "soft_target_row.h"

namespace fastkd::cuda::logits {

class Exponents {
 public:
  const bool is_rounded, has_hard;

  __device__ __forceinline__ Exponents(const Call& call, bool is_rounded)
      : is_rounded(is_rounded),
        has_hard(call.has_hard),
        scaled_rate_(call.rate),
        inverse_(call.inverse) {}

  // log2(e) / T, and log2(e).
  __device__ __forceinline__ float rate() const { return scaled_rate_ * float(kLogitScale); }
  static constexpr float kHardRate = float(kLog2E);
  // Makes nats of what is between the sides, scaled as a divergence is.
  __device__ __forceinline__ double inverse() const {
    return is_rounded ? kLogitScale / kLog2E : inverse_;
  }

  __device__ __forceinline__ float origin(float maximum) const { return origin(maximum, rate()); }
  __device__ __forceinline__ float hard_origin(float maximum) const {
    return origin(maximum, kHardRate);
  }

  // What brings exponentials from one maximum to another.
  __device__ __forceinline__ float soft(float from, float to) const {
    return moving(from, to, rate());
  }
  __device__ __forceinline__ float teacher(float from, float to) const { return soft(from, to); }
  __device__ __forceinline__ float hard(float from, float to) const {
    return moving(from, to, kHardRate);
  }
  __device__ __forceinline__ static float at_student(float apart) { return apart; }

  // Whether these units serve a row. The rounded ones do not where the exponent of a maximum may be
  // far from 0, or where the student alone excludes a class: 0 · inf is NaN if its probability
  // underflows.
  __device__ __forceinline__ bool serve(const RowState<float>& row) const {
    const float largest = has_hard ? fmaxf(rate(), kHardRate) : rate();
    const auto is_small = [&](float maximum) {
      return maximum == -INFINITY || fabsf(maximum * largest) <= kMostOrigin;
    };
    const float sum = row.difference + row.student + row.teacher + row.hard;
    return !is_rounded ||
           (is_small(row.student_max) && is_small(row.teacher_max) && fabsf(sum) <= FLT_MAX);
  }

  // A row in exact units.
  template <class D>
  __device__ RowState<double> exact(const RowState<float>& row) const {
    RowState<double> to{row.student_max, row.teacher_max, row.student, row.teacher,
                        row.hard,        row.difference,  row.logits};
    if (!is_rounded) return to;
    const double s = rounding(row.student_max, rate()), t = rounding(row.teacher_max, rate());
    const double by_s = exp2(s), by_t = exp2(t);
    to.difference += (D::kByTeacher ? to.teacher : to.student) * (t - s);
    to.difference *= (D::kByTeacher ? by_t : by_s) * (kLogitScale / rate());
    to.student *= by_s;
    to.teacher *= by_t;
    to.hard *= exp2(rounding(row.student_max, kHardRate));
    return to;
  }

 private:
  static constexpr float kMostOrigin = 0x1p22f;

  const float scaled_rate_;
  const double inverse_;

  __device__ __forceinline__ float origin(float maximum, float rate) const {
    return maximum == -INFINITY ? 0 : product(maximum, is_rounded ? rate : float(kLogitScale));
  }
  __device__ __forceinline__ float moving(float from, float to, float rate) const {
    if (from == to) return 1;
    if (from == -INFINITY) return 0;
    const float apart = origin(from, rate) - origin(to, rate);
    return exp2_of(is_rounded ? apart : apart * (rate / float(kLogitScale)));
  }
  __device__ __forceinline__ double rounding(float maximum, float rate) const {
    return maximum == -INFINITY ? 0 : origin(maximum, rate) - double(maximum) * double(rate);
  }
};

}  // namespace fastkd::cuda::logits
