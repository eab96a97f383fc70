// The pass between for divergences of probabilities: a row's exponentials are in cache and its sums
// are known.
#pragma once

#include <limits>

#include "logarithm.h"
#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

template <class A>
struct LogOfShare {
  vec_t<A> operator()(vec_t<A> x, vec_t<A> more) const { return log_of(x, more); }
  // Of a mixture; 0 where both sides underflow.
  static vec_t<A> inverse(vec_t<A> m) {
    return m < std::numeric_limits<A>::min() ? vec_t<A>{} : A(1) / m;
  }
};

template <class A>
Shares<A> shares_of(const Arguments<A>& a) {
  return {A(a.p.beta), A(1 - a.p.beta)};
}

// Of `n` exponentials, of which each factor makes probabilities; ψ takes the teacher's place.
template <class T, class A>
RowTerms add_terms(const Exponentials<A>& from, int n, A of_student, A of_teacher,
                   Shares<A> shares) {
  const Exponentials<A> of = from;
  RowTerms total{};
  over_pieces<A>(n, [&](int first, int size) {
    vec_t<A> phi = {}, psi = {};
    over_vectors<A>(size, [&](int i, auto lanes) {
      const vec_t<A> q = load_lanes<A>(of.student + first + i, lanes, A(0)) * of_student;
      const vec_t<A> p = load_lanes<A>(of.kept + first + i, lanes, A(0)) * of_teacher;
      const Terms<vec_t<A>> found = T::terms(p, q, shares, LogOfShare<A>{});
      phi += found.phi;
      psi += found.psi;
      store(found.psi, of.kept + first + i);
    });
    total.phi += sum<A>(phi);
    total.psi += sum<A>(psi);
  });
  return total;
}

}  // namespace fastkd::FASTKD_ISA
