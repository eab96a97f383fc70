// A block of one row's classes, small enough that both sides and their exponentials stay in the
// first-level cache.
#pragma once

#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

// Bytes between the logits computed and those fetched: 8 KiB beyond those whose maxima are taken.
constexpr int64_t kAhead = 12288;

// Whether there are registers for two loops in one: 32 with AVX-512, elsewhere half of that.
constexpr bool kInterleaves = kVectorBytes == 64;

// Both sides, contiguous; `size` is 0 where there is nothing.
template <class S>
struct Block {
  const S *student = nullptr, *teacher = nullptr;
  int size = 0;
};

// The maxima of a block, lane by lane.
template <class A, class S>
struct Maxima {
  Block<S> of{};
  vec_t<A> student = splat<A>(-INFINITY), teacher = splat<A>(-INFINITY);

  template <class Lanes>
  void take(int i, Lanes lanes) {
    student = max<A>(load_lanes<A>(of.student + i, lanes, A(-INFINITY)), student);
    teacher = max<A>(load_lanes<A>(of.teacher + i, lanes, A(-INFINITY)), teacher);
  }

  void take_from(int first) {
    over_vectors<A>(of.size - first, [&](int i, auto lanes) { take(first + i, lanes); });
  }
};

// The maximum to subtract: where every class is excluded, 0 leaves exp(-inf) = 0.
template <class A>
A origin(A maximum) {
  return maximum == A(-INFINITY) ? 0 : maximum;
}

// Of every lane.
template <class A>
struct Accumulators {
  vec_t<A> student, teacher, hard;
  vec_t<A> difference;  // of the divergence's terms, scaled
  vec_t<A> shifted;     // Σ s, shifted and scaled, for label smoothing

  void operator+=(const Accumulators& other) {
    student += other.student;
    teacher += other.teacher;
    hard += other.hard;
    difference += other.difference;
    shifted += other.shifted;
  }
};

// The exponentials of a block relative to the origins, and their sums. Logits are scaled in these
// alone, because there is no register for it in the loop: where they leave the range on the way, a
// sum is not finite, and `difference_with_exclusions` or `shifted_sum` has it. The maxima of the
// block after it, if wanted, are found in the same loop where it has room: beside so much
// arithmetic its loads cost little. `own` is whether the teacher's temperature is its own.
template <class D, bool own = false, class A, class S, class... Next>
Accumulators<A> exponentiate(const Block<S>& block, A s_origin, A t_origin, const Arguments<A>& a,
                             const Exponentials<A>& to, Next&... of_next) {
  using vec = vec_t<A>;
  constexpr int W = All<A>::value;
  const A lowest = -INFINITY, scale = A(kLogitScale);
  // Copies, which the stores below cannot change: they stay in registers.
  const Exp<A> exp_soft = a.raw_exp_soft, exp_hard = a.raw_exp_hard;
  [[maybe_unused]] const Exp<A> exp_teacher = a.raw_exp_teacher;
  [[maybe_unused]] const A ratio = A(a.rates.ratio);
  const bool has_hard = a.rates.has_hard, smooths = a.p.label_smoothing > 0;
  const S *student = block.student, *teacher = block.teacher;
  vec s_sum = {}, t_sum = {}, hard_sum = {}, difference = {}, shifted = {};
  const auto found = [&] {
    return Accumulators<A>{s_sum, t_sum, hard_sum, difference * scale, shifted * scale};
  };
  const auto step = [&](int i, auto lanes) {
    fetch(student + i, W, kAhead);
    fetch(teacher + i, W, kAhead);
    const vec s = load_lanes<A>(student + i, lanes, lowest) - s_origin;
    const vec t = load_lanes<A>(teacher + i, lanes, lowest) - t_origin;
    const vec es = exp_soft(s);
    vec et, apart, scaled;
    if constexpr (own) {
      et = exp_teacher(t);
      apart = t * ratio - s;
      scaled = at_student(t * scale, ratio) - s * scale;
    } else {
      et = exp_soft(t);
      apart = t - s;
      scaled = t * scale - s * scale;
    }
    s_sum += es;
    t_sum += et;
    difference += keep<A>(D::term(es, D::kept(es, et, apart), apart), lanes);
    store(es, to.student + i);
    store(D::kept(es, et, scaled), to.kept + i);
    if (has_hard) {
      const vec eh = exp_hard(s);
      hard_sum += eh;
      store(eh, to.hard + i);
    }
    if (smooths) shifted += keep<A>(s, lanes);
  };
  int done = 0;
  [[maybe_unused]] const auto both = [&](auto& wanted) {
    auto maxima = wanted;
    for (; kInterleaves && done + W <= block.size && done + W <= maxima.of.size; done += W) {
      maxima.take(done, All<A>{});
      step(done, All<A>{});
    }
    maxima.take_from(done);
    wanted = maxima;
  };
  (both(of_next), ...);
  Accumulators<A> total = found();
  over_pieces<A>(block.size - done, [&](int first, int n) {
    s_sum = t_sum = hard_sum = difference = shifted = vec{};
    over_vectors<A>(n, [&](int i, auto lanes) { step(done + first + i, lanes); });
    total += found();
  });
  return total;
}

// Σ s, shifted and scaled: -inf where the student excludes a class.
template <class A, class S>
double shifted_sum(const Block<S>& block, A s_shift) {
  double total = 0;
  for (int i = 0; i < block.size; ++i) total += widen(block.student[i]) * A(kLogitScale) - s_shift;
  return total;
}

// The sum of terms where a class may be excluded: 0 · inf would be NaN, and the term of a class may
// be infinite.
template <class D, bool own = false, class A, class S>
double difference_with_exclusions(const Block<S>& block, A s_shift, A t_shift,
                                  const Arguments<A>& a, const Exponentials<A>& of) {
  double total = 0;
  for (int i = 0; i < block.size; ++i) {
    const A s = widen(block.student[i]), t = widen(block.teacher[i]);
    A y = t * A(kLogitScale) - t_shift;
    if constexpr (own) y = at_student(y, A(a.rates.ratio));
    const A apart = y - (s * A(kLogitScale) - s_shift);
    total += term_of<D>(of.student[i], of.kept[i], apart, s == A(-INFINITY), t == A(-INFINITY));
  }
  return total;
}

// The gradient of a block. Flattened, so that what it is made of stays in registers.
template <class D, class A, class S>
[[gnu::flatten]] void combine(const Exponentials<A>& from, const Factors<A> k, int n, S* to,
                              bool non_temporal) {
  const Exponentials<A> of = from;
  write_vectors<A>(to, n, non_temporal, [=](int i, auto lanes) {
    return of.template gradient<D>(k,
                                   [=](const A* e) { return load_lanes<A>(e + i, lanes, A(0)); });
  });
}

// The gradient of the label's class.
template <class D, class A>
A label_gradient(const Exponentials<A>& from, const Factors<A>& k, int64_t label) {
  return from.template gradient<D>(k, [&](const A* e) { return e[label]; }) - k.label;
}

}  // namespace fastkd::FASTKD_ISA
