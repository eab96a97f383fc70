// A call of any divergence, whose temperatures may be the teacher's own and tensors: what its
// kernel knows of it, the rates of a row's exponentials, and what a divergence makes of a class.
#pragma once

#include <cfloat>

#include "../probabilities.h"
#include "soft_target_mean.h"

namespace fastkd::cuda::logits {

// One teacher is a mean of one, whose gradient may be wanted, too.
struct GeneralCall {
  MeanCall mean;
  double beta, teacher_temperature;
  double softcap, teacher_softcap;  // of logits that were capped, or 0
  TeacherIs teacher_is;
  // The temperatures of rows, or none: of the student, of the teachers, and the one whose square
  // multiplies the divergence. Their gradients, if they are wanted, come one kind after another.
  const void *temperatures, *teacher_temperatures, *roots;
  void* to_temperatures;
  // Where this is no gradient but the sums over a shard's classes that statistics are to have: (Σφ,
  // Σψ) of each row.
  double* terms;

  constexpr bool is_capped() const { return softcap != 0 || teacher_softcap != 0; }
  __device__ __forceinline__ bool is_stated() const { return teacher_is != TeacherIs::logits; }
  __device__ __forceinline__ bool has_one_teacher() const { return mean.count == 1; }
  // Whether this is a backward call that has what forward found of its rows.
  __device__ __forceinline__ bool has_statistics() const {
    return mean.call.is_backward() && mean.call.statistics != nullptr;
  }
};

// f(a divergence), of all.
template <class F>
__device__ __forceinline__ void with_any_divergence(Divergence which, const F& f) {
  switch (which) {
    case Divergence::forward_kl:
      return f(ForwardKl{});
    case Divergence::reverse_kl:
      return f(ReverseKl{});
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

template <class D>
constexpr bool kIsKl = std::is_same_v<D, ForwardKl> || std::is_same_v<D, ReverseKl>;
// What the factors of a gradient know of a divergence.
template <class D>
using FactorsOf = std::conditional_t<kIsKl<D>, D, Normalized>;

template <class A>
constexpr A kLargest = A(sizeof(A) == 8 ? DBL_MAX : FLT_MAX);
template <class A>
constexpr A kLeastNormal = A(sizeof(A) == 8 ? DBL_MIN : FLT_MIN);

// Gives exponentials of scaled logits the rate of a row's own temperature; returns 1 / T, as the
// arithmetic has it. Where the largest logit alone counts, or all count the same, 0 · inf would be
// NaN.
template <class A>
__device__ __forceinline__ double use_temperature(double temperature, Rates<A>& rates) {
  const double wanted = kLog2E / temperature / kLogitScale, most = double(kLargest<A>);
  rates.at_temperature = A(fmin(fmax(wanted, double(kLeastNormal<A>)), most));
  return wanted > most ? 1 / temperature : double(rates.at_temperature) * (kLogitScale / kLog2E);
}

// The rates of one row's exponentials.
template <class A>
struct RowRates {
  double temperature, teacher_temperature;
  MeanRates<A> student, teacher;
  double inverse;  // 1 / T of the student's, as the arithmetic has it
  double ratio;    // of the teacher's rate to the student's
  // What multiplies the divergence besides its weight: NaN where a temperature is not above 0.
  double squared;

  __device__ __forceinline__ RowRates(const GeneralCall& of, uint32_t row)
      : temperature(of.mean.call.temperature),
        teacher_temperature(of.teacher_temperature),
        student(of.mean),
        teacher(of.mean),
        squared(1) {
    if (of.temperatures != nullptr) {
      const auto at = [=](const void* from) { return double(static_cast<const A*>(from)[row]); };
      const double root = at(of.roots);
      temperature = at(of.temperatures);
      teacher_temperature = at(of.teacher_temperatures);
      squared = temperature > 0 && teacher_temperature > 0 ? root * root : double(NAN);
    }
    inverse = use_temperature(temperature, student);
    ratio = use_temperature(teacher_temperature, teacher) / inverse;
  }
};

// A scaled difference of the teacher's logits, brought to the student's temperature. What is finite
// stays so: a class of no probability has no term, and 0 · inf would be NaN.
template <class A>
__device__ __forceinline__ A at_student(A apart, A ratio) {
  const A lowest = -kLargest<A> / 4, by = apart * ratio;
  return apart == A(-INFINITY) ? apart : by < lowest ? lowest : by;
}

template <class A>
struct LogOfShare {
  // Of an x that is 1 + more: near 1 the latter has the digits. Finite also of 0.
  __device__ __forceinline__ A operator()(A x, A more) const {
    return fabs(more) < A(0.5) ? log1p(more) : x > 0 ? log(x) : x;
  }
  // Of a mixture; 0 where both sides underflow.
  __device__ __forceinline__ static A inverse(A m) { return m < kLeastNormal<A> ? A(0) : 1 / m; }
};

// What turns a row's exponentials into what a divergence takes.
template <class A>
struct RowTarget {
  A to_q, to_p;  // of probabilities
  A ratio;       // of the teacher's rate to that which its logits have here
  Shares<A> shares;
};

// What is kept of a class, and what it adds to the sums of its row: of a KL divergence its term and
// the target's mass, of another one φ and ψ.
template <class A>
struct OfClass {
  A kept, term, other;
};

// From the logits relative to the maxima, each at its own temperature, and the exponentials, of
// which the teacher's is −0 where it excludes the class.
template <class D, class A>
__device__ __forceinline__ OfClass<A> of_class(A x, A y, A es, A et, const RowTarget<A>& of) {
  if constexpr (kIsKl<D>) {
    const A apart = at_student(y, of.ratio) - x;
    const A kept = D::kept(es, et, apart);
    return {kept, term_of<D>(es, kept, apart, x == A(-INFINITY), bool(signbit(et))), et};
  } else {
    const Terms<A> terms = D::terms(et * of.to_p, es * of.to_q, of.shares, LogOfShare<A>{});
    return {terms.psi, terms.phi, terms.psi};
  }
}

}  // namespace fastkd::cuda::logits
