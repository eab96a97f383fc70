// The divergences between the softmaxes of two sides, for the kernels of every device.
//
// One is a struct of functions on a class or a row. Of a class they know
//   es, et  the exponentials of student and teacher at the temperature, relative to some maxima,
//   apart   (t - its maximum) - (s - its maximum), scaled: T · log(et / es).
// Each is a number, or a vector of as many as a register has. A first pass keeps es and `kept` of
// each class, and adds up `term` of these for the row's divergence; a second pass writes the
// gradient
//   es · student + with_teacher(es, kept, teacher)
// from what the first one kept of a class, and two factors of the row.
//
// The Kullback-Leibler divergences follow from sums that the first pass has. The others are sums of
// terms of the probabilities p and q, which a row's sums must be known for: a pass between the two.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "anywhere.h"

namespace fastkd {

enum class Divergence { forward_kl, reverse_kl, jsd, tvd, skew_kl, skew_reverse_kl };
constexpr std::array<const char*, 6> names_of(Divergence) {
  return {"forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl"};
}

// Where a maximum is subtracted from logits they are multiplied by 2^-24. Any two finite logits
// then have a finite difference, and 2^22 classes a finite sum of differences: excluded classes
// alone are infinite. A power of 2 rounds nothing, so results have the same bits.
constexpr double kLogitScale = 0x1p-24;

template <class F>
struct SoftFactors {
  F student, teacher;
};

// KL(p‖q) = Σ p (log p − log q), a mean that the teacher's exponentials weigh.
struct ForwardKl {
  // Whether its terms are of probabilities.
  static constexpr bool kNormalizes = false;
  // Whose exponentials weigh the mean. A class that this side excludes contributes 0, and one that
  // the other side alone excludes is infinite.
  static constexpr bool kByTeacher = true;

  template <class V>
  FASTKD_ANYWHERE static V term(V, V kept, V apart) {
    return kept * apart;
  }
  // From that mean and log(zs / zt), both scaled; and the mean from the row's divergence.
  FASTKD_ANYWHERE static double of_row(double mean, double log_ratio) { return mean + log_ratio; }
  FASTKD_ANYWHERE static double mean_of(double divergence, double log_ratio) {
    return divergence - log_ratio;
  }

  // The student's gradient: q − p.
  template <class V>
  FASTKD_ANYWHERE static V kept(V, V et, V) {
    return et;
  }
  template <class V, class F>
  FASTKD_ANYWHERE static V with_teacher(V, V kept, F teacher) {
    return kept * teacher;
  }
  // Whether the factors take the mean, and those of sums zs and zt of exponentials, for a gradient
  // that is multiplied by `weight`. `inverse` is 1 / T.
  static constexpr bool kTakesMean = false;
  template <class F>
  FASTKD_ANYWHERE static SoftFactors<F> factors(F weight, F zs, F zt, F /* mean */,
                                                F /* inverse */) {
    return {weight / zs, -(weight / zt)};
  }
  // Where the exponentials are relative to other maxima, which multiplies those of a row by `by_s`
  // and `by_t` and adds `apart` to what is between the sides.
  template <class F>
  FASTKD_ANYWHERE static SoftFactors<F> moved(SoftFactors<F> of, F by_s, F by_t, F /* apart */) {
    return {of.student * by_s, of.teacher * by_t};
  }

  // The teacher's gradient: p (log p − log q − KL(p‖q)). `surplus` is that last factor, scaled;
  // the others are weight / zs and weight / zt.
  template <class V, class F>
  FASTKD_ANYWHERE static V to_teacher(V, V et, V surplus, F, F of_teacher) {
    return et * of_teacher * surplus * F(1 / kLogitScale);
  }
};

// KL(q‖p) = Σ q (log q − log p), the negative of a mean that the student's exponentials weigh.
struct ReverseKl {
  static constexpr bool kNormalizes = false;
  static constexpr bool kByTeacher = false;

  template <class V>
  FASTKD_ANYWHERE static V term(V es, V, V apart) {
    return es * apart;
  }
  FASTKD_ANYWHERE static double of_row(double mean, double log_ratio) {
    return -(mean + log_ratio);
  }
  FASTKD_ANYWHERE static double mean_of(double divergence, double log_ratio) {
    return -(divergence + log_ratio);
  }

  // The student's gradient: −q (log(p / q) − the mean of that). What underflows has none.
  template <class V>
  FASTKD_ANYWHERE static V kept(V es, V, V apart) {
    return es == 0 ? V{} : es * apart;
  }
  template <class V, class F>
  FASTKD_ANYWHERE static V with_teacher(V, V kept, F teacher) {
    return kept * teacher;
  }
  static constexpr bool kTakesMean = true;
  template <class F>
  FASTKD_ANYWHERE static SoftFactors<F> factors(F weight, F zs, F /* zt */, F mean, F inverse) {
    const F scaled = weight / zs / F(kLogitScale);
    return {weight == 0 ? F(0) : scaled * mean, -(scaled * inverse)};
  }
  template <class F>
  FASTKD_ANYWHERE static SoftFactors<F> moved(SoftFactors<F> of, F by_s, F /* by_t */, F apart) {
    return {(of.student + of.teacher * apart) * by_s, of.teacher * by_s};
  }

  // The teacher's gradient: p − q.
  template <class V, class F>
  FASTKD_ANYWHERE static V to_teacher(V es, V et, V, F of_student, F of_teacher) {
    return et * of_teacher - es * of_student;
  }
};

// What a divergence of probabilities makes of a class: its term φ, and ψ = q ∂φ/∂q, of which the
// student's gradient is ψ − q Σψ.
template <class V>
struct Terms {
  V phi, psi;
};

// The shares of the sides in a mixture.
template <class A>
struct Shares {
  A beta, rest;
};

// What the divergences of mixtures ask for, of numbers; the CPU has the same of vectors.
template <class A>
struct LogOfShare {
  // Of an x that is 1 + more: near 1 the latter has the digits. Finite also of 0.
  FASTKD_ANYWHERE A operator()(A x, A more) const {
    return std::fabs(more) < A(0.5) ? std::log1p(more) : x > 0 ? std::log(x) : x;
  }
  // Of a mixture; 0 where both sides underflow.
  FASTKD_ANYWHERE static A inverse(A m) { return m < std::numeric_limits<A>::min() ? A(0) : 1 / m; }
};

// Divergences of mixtures m. `Log` is what has log(x / m), of x and of what x / m is more than 1:
// where the two nearly agree the quotient itself has no digits for it.

// β KL(p‖m) + (1 − β) KL(q‖m), m = β p + (1 − β) q.
struct Jsd {
  template <class V, class A, class Log>
  FASTKD_ANYWHERE static Terms<V> terms(V p, V q, Shares<A> of, const Log& log) {
    const V d = p - q, by_m = log.inverse(p * of.beta + q * of.rest), u = d * by_m;
    const V of_q = q * log(q * by_m, -(u * of.beta)) * of.rest;
    return {p * log(p * by_m, u * of.rest) * of.beta + of_q, of_q};
  }
};

// KL(p‖m), m = β p + (1 − β) q. Off each term goes p − m, whose sum is 0: so none is negative.
struct SkewKl {
  template <class V, class A, class Log>
  FASTKD_ANYWHERE static Terms<V> terms(V p, V q, Shares<A> of, const Log& log) {
    const V more = (p - q) * of.rest, by_m = log.inverse(p * of.beta + q * of.rest);
    const V part = p * by_m;
    return {p * log(part, more * by_m) - more, -(q * of.rest * part)};
  }
};

// KL(q‖m), m = β q + (1 − β) p.
struct SkewReverseKl {
  template <class V, class A, class Log>
  FASTKD_ANYWHERE static Terms<V> terms(V p, V q, Shares<A> of, const Log& log) {
    const V more = (q - p) * of.rest, by_m = log.inverse(q * of.beta + p * of.rest);
    const V of_q = q * log(q * by_m, more * by_m);
    return {of_q - more, of_q + p * of.rest * (q * by_m)};
  }
};

// Σ |p − q| / 2, without a slope where the two are equal.
struct Tvd {
  template <class V, class A, class Log>
  FASTKD_ANYWHERE static Terms<V> terms(V p, V q, Shares<A>, const Log&) {
    // The larger and the smaller: a difference that is fused with the products which p and q are
    // would not be 0 where they are equal.
    const V larger = p < q ? q : p, smaller = p < q ? p : q, half = q * A(0.5);
    return {(larger - smaller) * A(0.5), p < q ? half : p > q ? -half : V{}};
  }
};

// Any of these. The exponentials are kept; the pass between finds the terms of their probabilities
// and leaves ψ in their teacher's place. The mean that the gradient takes is Σψ.
struct Normalized {
  static constexpr bool kNormalizes = true;
  static constexpr bool kByTeacher = true;
  static constexpr bool kTakesMean = true;

  template <class V>
  FASTKD_ANYWHERE static V term(V, V, V) {
    return V{};
  }
  template <class V>
  FASTKD_ANYWHERE static V kept(V, V et, V) {
    return et;
  }
  template <class V, class F>
  FASTKD_ANYWHERE static V with_teacher(V, V psi, F teacher) {
    return psi * teacher;
  }
  template <class F>
  FASTKD_ANYWHERE static SoftFactors<F> factors(F weight, F zs, F /* zt */, F mean, F) {
    return {weight == 0 ? F(0) : -(weight / zs * mean), weight};
  }
  template <class F>
  FASTKD_ANYWHERE static SoftFactors<F> moved(SoftFactors<F> of, F by_s, F, F) {
    return {of.student * by_s, of.teacher};
  }
};

// f(the divergence), of those of probabilities the one that a call names.
template <class F>
auto with_terms(Divergence which, const F& f) {
  switch (which) {
    case Divergence::tvd:
      return f(Tvd{});
    case Divergence::skew_kl:
      return f(SkewKl{});
    case Divergence::skew_reverse_kl:
      return f(SkewReverseKl{});
    default:
      return f(Jsd{});
  }
}

// f(the divergence that a call names), of those that GPUs have fast kernels for.
template <class F>
auto with_divergence(Divergence which, const F& f) {
  if (which != Divergence::forward_kl)
    throw std::invalid_argument("only the general form has this divergence");
  return f(ForwardKl{});
}

}  // namespace fastkd
