// Teachers that kept k classes: what the terms of these classes are, on every device. In double,
// since a row has few of them.
#pragma once

#include <cmath>

#include "divergence.h"

namespace fastkd {

// What top_k_sums finds of a row.
struct UnlistedSums {
  double maximum, sum, hard, logits;
};

// One class that is compared, or all that no slot lists as one more.
struct Slot {
  double log_p, log_q;  // scaled by kLogitScale
  double p, q;

  FASTKD_ANYWHERE Slot(double log_p, double log_q)
      : log_p(log_p),
        log_q(log_q),
        p(std::exp(log_p / kLogitScale)),
        q(std::exp(log_q / kLogitScale)) {}
};

// Its φ, scaled, and its ψ. A p of −∞ belongs to no class at all; padding is not asked about.
FASTKD_ANYWHERE Terms<double> terms_of(Divergence which, double beta, const Slot& of) {
  const double p = of.p, q = of.q;
  const Shares<double> shares{beta, 1 - beta};
  Terms<double> found;
  switch (which) {
    case Divergence::forward_kl:
      if (of.log_p == -INFINITY) return {0, 0};
      // A class that only the student excludes is infinite, even where p underflows.
      return {of.log_q == -INFINITY ? INFINITY : p * (of.log_p - of.log_q), -p};
    case Divergence::reverse_kl: {
      if (q == 0) return {0 * p, 0 * p};  // NaN of NaN
      const double phi = q * (of.log_q - of.log_p);
      return {phi, q + phi / kLogitScale};
    }
    case Divergence::tvd:
      found = Tvd::terms(p, q, shares, LogOfShare<double>{});
      break;
    // What is taken off a class sums to 0 where both sides sum to 1. Slots may not.
    case Divergence::skew_kl:
      found = SkewKl::terms(p, q, shares, LogOfShare<double>{});
      found.phi += (p - q) * shares.rest;
      break;
    case Divergence::skew_reverse_kl:
      found = SkewReverseKl::terms(p, q, shares, LogOfShare<double>{});
      found.phi += (q - p) * shares.rest;
      break;
    default:
      found = Jsd::terms(p, q, shares, LogOfShare<double>{});
  }
  const double nan = 0 * (p * q);  // where one is, which a comparison does not show; otherwise 0
  return {(found.phi + nan) * kLogitScale, found.psi + nan};
}

}  // namespace fastkd
