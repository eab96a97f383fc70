// Several teachers: the mean u of their probabilities, and the rows that have it for a target.
//
// To the student u is one teacher whose exponentials are u and whose logits are T log u. It stays
// in cache; each tensor is read from memory once.
#pragma once

#include <limits>

#include "logarithm.h"
#include "soft_target_row.h"

namespace fastkd::FASTKD_ISA {

constexpr int kMostTeachers = 64;  // as in fastkd/losses/logits.py

// A teacher's exponentials. Those of a class that it excludes are -0, which sums preserve only
// where no teacher has anything else: so a class that all exclude is told from one that underflows.
template <class A>
vec_t<A> exponentials_of(vec_t<A> logits, vec_t<A> shift, const Exp<A>& exp_soft) {
  return logits == -INFINITY ? (vec_t<A>)sign_bits<A>() : exp_soft(logits * A(kLogitScale) - shift);
}

// Where every teacher excludes a class.
template <class A>
mask_t<A> excludes(vec_t<A> mean) {
  return (bits_t<A>)mean == sign_bits<A>();
}

// T log u, scaled, of where u does not underflow.
template <class A>
vec_t<A> logits_of(vec_t<A> mean, A scaled_temperature) {
  return log(max<A>(mean, splat<A>(std::numeric_limits<A>::min()))) * scaled_temperature;
}

// f(p) of the `n` logits from the row's class `first` on, contiguous: where they are, or gathered
// into `buffer`.
template <class A, class F>
auto with_block(const Side& side, int64_t row_offset, int64_t first, int n, A* buffer, const F& f) {
  const int64_t offset = row_offset + first * side.class_stride;
  if (side.class_stride != 1) {
    gather(*side.tensor, offset, side.class_stride, n, buffer);
    return f(static_cast<const A*>(buffer));
  }
  return with_storage(side.tensor->dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    return f(static_cast<const S*>(at<S>(*side.tensor, offset)));
  });
}

template <class A, class S>
A maximum_of(const S* from, int n) {
  vec_t<A> maximum = splat<A>(-INFINITY);
  over_vectors<A>(n, [&](int i, auto lanes) {
    fetch(from + i, All<A>::value, kAhead);
    maximum = max<A>(load_lanes<A>(from + i, lanes, A(-INFINITY)), maximum);
  });
  return max_of<A>(maximum);
}

// The maximum of logits of a block or a row, and the sum of exponentials relative to it.
struct Part {
  double maximum, sum;
};

// T log u of one class, scaled, where u underflows and its logarithm counts: by the logarithms of
// the teachers' own probabilities, of which `sums` has the rows'.
template <class A>
double logit_of(const Arguments<A>& a, const Part* sums, int64_t row, int64_t c) {
  double highest = -INFINITY, total = 0;
  for (int64_t m = 0; m < a.teachers; ++m) {
    const Side& side = a.rows.sides[size_t(kTeacher + m)];
    A logit;
    gather(*side.tensor, a.rows.offset(side, row) + c * side.class_stride, 1, 1, &logit);
    const double x = (double(logit) - sums[m].maximum) * a.rates.teacher_inverse +
                     std::log(a.p.weights[size_t(m)] / sums[m].sum);
    if (x == -INFINITY) continue;
    const double both = x > highest ? x : highest;
    total = total * std::exp(highest - both) + std::exp(x - both);
    highest = both;
  }
  return (highest + std::log(total)) / a.rates.inverse * kLogitScale;
}

// The exponentials of a teacher's block take the place of the teacher's before, whose `share` goes
// into the mean. `earlier` is how many came before: none, one, or more.
template <int earlier, class A, class S>
Part take_teacher(const S* from, int n, Exp<A> exp_soft, A share, const Exponentials<A>& to) {
  const A maximum = maximum_of<A>(from, n), by = shift(maximum);
  A *e = to.student, *mean = to.kept;
  vec_t<A> total = {};
  over_vectors<A>(n, [&](int i, auto lanes) {
    if constexpr (earlier == 1) store(load(e + i) * share, mean + i);
    if constexpr (earlier == 2) store(load(mean + i) + load(e + i) * share, mean + i);
    const vec_t<A> logits = load_lanes<A>(from + i, lanes, A(-INFINITY));
    const vec_t<A> exponential = exponentials_of<A>(logits, splat<A>(by), exp_soft);
    total += exponential;
    store(exponential, e + i);
  });
  return {maximum, sum<A>(total)};
}

// The student's block, when the last teacher's exponentials are in the student's place: `share` of
// them completes the mean. `exact(i)` is the logit of a class whose mean underflows.
template <class D, class A, class S, class F>
RowState<double> take_student(const S* from, int n, const Arguments<A>& a, A share,
                              const Exponentials<A>& to, const F& exact) {
  using vec = vec_t<A>;
  const A maximum = maximum_of<A>(from, n), by = shift(maximum);
  const Exp<A> exp_soft = a.exp_soft, exp_hard = a.exp_hard;
  const A scale = A(kLogitScale), temperature = A(1 / a.rates.inverse * kLogitScale);
  const bool has_hard = a.rates.has_hard, smooths = a.p.label_smoothing > 0;
  const bool has_terms = !D::kNormalizes && (a.losses || D::kTakesMean);
  A *e = to.student, *mean = to.kept, *hard = to.hard;
  vec sum_e = {}, mass = {}, sum_hard = {}, difference = {}, shifted = {};
  over_vectors<A>(n, [&](int i, auto lanes) {
    const vec logits = load_lanes<A>(from + i, lanes, A(-INFINITY)), s = logits * scale - by;
    const vec u = keep<A>(load(mean + i) + load(e + i) * share, lanes);
    const vec es = exp_soft(s);
    mass += u;
    sum_e += es;
    vec kept = u;
    if (has_terms) {
      vec y = logits_of<A>(u, temperature);
      if constexpr (!D::kByTeacher) {
        const auto low = u < std::numeric_limits<A>::min() * A(0x1p24);
        if (fold(low, [](auto x, auto y) { return x | y; }))
          for (int k = 0; k < All<A>::value && i + k < n; ++k)
            if (low[k] && !std::signbit(u[k])) y[k] = A(exact(i + k));
      }
      const vec apart = y - s;
      kept = D::kept(es, u, apart);
      difference +=
          keep<A>(term_of<D>(es, kept, apart, logits == -INFINITY, excludes<A>(u)), lanes);
    }
    store(kept, mean + i);
    store(es, e + i);
    if (has_hard) {
      const vec eh = exp_hard(s);
      sum_hard += eh;
      store(eh, hard + i);
    }
    if (smooths) shifted += keep<A>(s, lanes);
  });
  return {maximum,
          0,
          sum<A>(sum_e),
          sum<A>(mass),
          sum<A>(sum_hard),
          sum<A>(difference),
          smooths ? sum<A>(shifted) + n * double(by) : 0};
}

// A row with the mean of several teachers for its target.
template <class D, class A>
void mean_row(const Arguments<A>& a, int64_t row) {
  const RowMemory<A> memory(a, true);
  alignas(64) A gathered[kMostBlock];
  // f(b, p, n) of the blocks of a side, whose `n` logits are at p.
  const auto over_blocks = [&](const Side& side, const auto& f) {
    const int64_t offset = a.rows.offset(side, row);
    for (int64_t b = 0; b < memory.blocks; ++b) {
      const int64_t first = b * memory.width;
      const int n = int(a.classes - first < memory.width ? a.classes - first : memory.width);
      with_block(side, offset, first, n, gathered, [&](const auto* from) { f(b, from, n); });
    }
  };

  // What brings the exponentials of a teacher's block to its share in the mean.
  double maximum = 0, factor = 0;
  Part teachers[D::kByTeacher ? 1 : kMostTeachers];
  const auto share = [&](int64_t b) {
    return A(factor * a.rates.teacher(memory.teacher_max[b], maximum));
  };
  for (int64_t m = 0; m < a.teachers; ++m) {
    double highest = -INFINITY, total = 0;
    over_blocks(a.rows.sides[size_t(kTeacher + m)], [&](int64_t b, const auto* from, int n) {
      using S = std::decay_t<decltype(*from)>;
      const auto take = m == 0   ? take_teacher<0, A, S>
                        : m == 1 ? take_teacher<1, A, S>
                                 : take_teacher<2, A, S>;
      const Part part = take(from, n, a.exp_teacher, m == 0 ? A(0) : share(b), memory.block(b));
      const double both = part.maximum > highest ? part.maximum : highest;
      total =
          total * a.rates.teacher(highest, both) + part.sum * a.rates.teacher(part.maximum, both);
      highest = both;
      memory.teacher_max[b] = A(part.maximum);
    });
    if constexpr (!D::kByTeacher) teachers[m] = {highest, total};
    maximum = highest;
    factor = a.p.weights[size_t(m)] / total;
  }

  RowState<double> sums{};
  over_blocks(a.rows.sides[kStudent], [&](int64_t b, const auto* from, int n) {
    const auto exact = [&](int i) { return logit_of(a, teachers, row, b * memory.width + i); };
    const RowState<double> found = take_student<D>(from, n, a, share(b), memory.block(b), exact);
    memory.student_max[b] = A(found.student_max);
    memory.teacher_max[b] = 0;
    if (b == 0)
      sums = found;
    else
      merge<D>(sums, found, a.rates);
  });
  finish_row<D>(a, row, sums, memory);
}

}  // namespace fastkd::FASTKD_ISA
