// The logarithms of probabilities, in the place of a teacher's logits (see ../probabilities.h).
#pragma once

#include <limits>

#include "../probabilities.h"
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

}  // namespace fastkd::FASTKD_ISA
