// Teachers whose probabilities are used as they are. To the loops over classes they are logits
// log p at temperature 1, whose softmax is p / S with S = Σp: what S changes is put right for a row
// as a whole.
#pragma once

#include <cmath>

#include "divergence.h"
#include "soft_target.h"

namespace fastkd {

// S of a row, from the maximum of log p and the sum of exponentials relative to that.
struct Mass {
  double value, log;  // the logarithm is scaled

  FASTKD_ANYWHERE Mass(double maximum, double sum)
      : value(sum * exp(maximum)), log((std::log(sum) + maximum) * kLogitScale) {}
};

// A KL divergence of p, from that of p / S, and what multiplies the weight of its gradient. KL(p‖q)
// is S KL(p/S ‖ q) + S log S: of no mass 0, unless a class is infinite.
FASTKD_ANYWHERE double with_mass(ForwardKl, double divergence, const Mass& mass) {
  if (mass.value == 0) return divergence == INFINITY ? divergence : 0;
  return mass.value * (divergence + mass.log);
}
FASTKD_ANYWHERE double weight_of(ForwardKl, const Mass& mass) { return mass.value; }

// KL(q‖p) is KL(q ‖ p/S) − log S.
FASTKD_ANYWHERE double with_mass(ReverseKl, double divergence, const Mass& mass) {
  return mass.log == -INFINITY ? INFINITY : divergence - mass.log;
}
FASTKD_ANYWHERE double weight_of(ReverseKl, const Mass&) { return 1; }

// What the terms of the skew divergences lack: what is taken off them sums to 0 where S is 1.
FASTKD_ANYWHERE double taken_off(Divergence which, double beta, double mass) {
  switch (which) {
    case Divergence::skew_kl:
      return (1 - beta) * (mass - 1);
    case Divergence::skew_reverse_kl:
      return (1 - beta) * (1 - mass);
    default:
      return 0;
  }
}

}  // namespace fastkd
