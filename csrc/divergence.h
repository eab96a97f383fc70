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
#pragma once

#include <array>

#include "anywhere.h"

namespace fastkd {

enum class Divergence { forward_kl };
constexpr std::array<const char*, 1> names_of(Divergence) { return {"forward_kl"}; }

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

// f(a divergence), of the one that a call names.
template <class F>
auto with_divergence(Divergence which, const F& f) {
  switch (which) {
    case Divergence::forward_kl:
      break;
  }
  return f(ForwardKl{});
}

}  // namespace fastkd
