// Teachers whose probabilities are used as they are. To the loops over classes they are logits
// log p at temperature 1, whose softmax is p / S with S = Σp: what S changes is put right for a row
// as a whole.
#pragma once

#include <cmath>
#include <limits>

#include "logarithm.h"
#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

// log(x): -inf of 0, NaN of negative numbers.
template <class A>
vec_t<A> log_of_probability(vec_t<A> x) {
  const auto is_low = x < std::numeric_limits<A>::min();
  // What is subnormal is raised into the range in which the logarithm is right.
  const vec_t<A> raised = is_low ? x * A(0x1p64) : x;
  const vec_t<A> normal = log(raised) - (is_low ? splat<A>(A(44.361419555836499802)) : vec_t<A>{});
  const vec_t<A> special = x == 0 ? splat<A>(-INFINITY) : x == INFINITY ? x : splat<A>(NAN);
  return x > 0 && x < INFINITY ? normal : special;
}

template <class A>
void take_logarithms(A* of, int n) {
  over_vectors<A>(n, [&](int i, auto lanes) {
    store_lanes<A>(log_of_probability<A>(load_lanes<A>(of + i, lanes, A(1))), of + i, lanes);
  });
}

// S of a row, from the maximum logarithm and the sum of exponentials relative to that.
struct Mass {
  double value, log;

  template <class A>
  Mass(const Arguments<A>& a, double maximum, double sum)
      : value(sum * a.rates.teacher(maximum, 0)),
        log((std::log(sum) + maximum * a.rates.teacher_inverse) * kLogitScale) {}  // scaled
};

// A KL divergence of p, from that of p / S, and what multiplies the weight of its gradient. KL(p‖q)
// is S KL(p/S ‖ q) + S log S: of no mass 0, unless a class is infinite.
inline double with_mass(ForwardKl, double divergence, const Mass& mass) {
  if (mass.value == 0) return divergence == INFINITY ? divergence : 0;
  return mass.value * (divergence + mass.log);
}
inline double weight_of(ForwardKl, const Mass& mass) { return mass.value; }

// KL(q‖p) is KL(q ‖ p/S) − log S.
inline double with_mass(ReverseKl, double divergence, const Mass& mass) {
  return mass.log == -INFINITY ? INFINITY : divergence - mass.log;
}
inline double weight_of(ReverseKl, const Mass&) { return 1; }

// What the terms of the skew divergences lack: what is taken off them sums to 0 where S is 1.
inline double taken_off(const SoftTargetParameters& p, double mass) {
  switch (p.divergence) {
    case Divergence::skew_kl:
      return (1 - p.beta) * (mass - 1);
    case Divergence::skew_reverse_kl:
      return (1 - p.beta) * (1 - mass);
    default:
      return 0;
  }
}

}  // namespace fastkd::FASTKD_ISA
