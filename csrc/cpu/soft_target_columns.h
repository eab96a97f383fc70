// Soft targets where rows are contiguous and classes apart (dim=1 of N, C, H, W): a vector holds
// one class of as many rows as it has lanes, so nothing is transposed or summed across lanes.
#pragma once

#include "soft_target_lanes.h"
#include "soft_target_teachers.h"

namespace fastkd::FASTKD_ISA {

constexpr int kClassesAhead = 4;

// f(first, last) for stretches of 32 classes: sums of sums, so that many classes do not add up many
// roundings.
template <class F>
void over_classes(int64_t classes, const F& f) {
  for (int64_t first = 0; first < classes; first += 32)
    f(first, first + 32 < classes ? first + 32 : classes);
}

template <class A>
vec_t<A> maximum_lanes(const A* logits, int64_t classes) {
  vec_t<A> maximum = splat<A>(-INFINITY);
  for (int64_t c = 0; c < classes; ++c) maximum = max<A>(load(logits + c * All<A>::value), maximum);
  return maximum;
}

// One vector of rows, class after class: the share of one of several teachers in their mean.
template <class A>
void teacher_lanes(A* t, const Arguments<A>& a, double weight, bool is_first, A* mean) {
  constexpr int W = Simd<A>::width;
  const vec_t<A> shift = maximum_lanes(t, a.classes) * A(kLogitScale);
  vec_t<A> total = {};
  over_classes(a.classes, [&](int64_t c, int64_t last) {
    vec_t<A> part = {};
    for (; c < last; ++c) {
      const vec_t<A> e = exponentials_of<A>(load(t + c * W), shift, a.exp_soft);
      part += e;
      store(e, t + c * W);
    }
    total += part;
  });
  const vec_t<A> share = A(weight) / total;
  for (int64_t c = 0; c < a.classes; ++c) {
    const vec_t<A> u = load(t + c * W) * share;
    store(is_first ? u : load(mean + c * W) + u, mean + c * W);
  }
}

// One class of the target of a vector of rows: its exponentials, its logits as the student's are,
// and where it is excluded.
template <class A>
struct Target {
  vec_t<A> e, logits;
  mask_t<A> is_excluded;
};

// The terms of a vector of rows, whose sums are known.
template <class A>
void lane_terms(const Exponentials<A>& of, const Arguments<A>& a, Lanes<A>& rows) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const Shares<A> shares = shares_of(a);
  const vec of_student = A(1) / rows.student, of_teacher = A(1) / rows.teacher;
  with_terms(a.p.divergence, [&](auto terms) {
    over_classes(a.classes, [&](int64_t c, int64_t last) {
      vec phi = {}, psi = {};
      for (; c < last; ++c) {
        const vec q = load(of.student + c * W) * of_student, p = load(of.kept + c * W) * of_teacher;
        const Terms<vec> found = decltype(terms)::terms(p, q, shares, LogOfShare<A>{});
        phi += found.phi;
        psi += found.psi;
        store(found.psi, of.kept + c * W);
      }
      rows.phi += phi;
      rows.psi += psi;
    });
  });
}

// One vector of rows from `first` on, class after class. What lies at `of` becomes the exponentials
// and what is kept, then the student's become the gradient. `target` makes a class's from what lies
// in the place of what is kept.
template <class D, class A, class F>
void forward_lanes(const Exponentials<A>& of, vec_t<A> teacher_max, const F& target,
                   const Arguments<A>& a, int64_t first_row, int lanes) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  A *s = of.student, *t = of.kept, *h = of.hard;
  const A scale = A(kLogitScale);
  Lanes<A> rows{};
  rows.student_max = maximum_lanes(s, a.classes);
  rows.teacher_max = teacher_max;
  const vec shift = rows.student_max * scale;
  for (int lane = 0; a.labels && lane < lanes; ++lane)
    if (!a.ignores(first_row + lane)) rows.label[lane] = s[a.labels[first_row + lane] * W + lane];
  over_classes(a.classes, [&](int64_t c, int64_t last) {
    vec student = {}, teacher = {}, hard = {}, difference = {}, shifted = {};
    for (; c < last; ++c) {
      const vec logits = load(s + c * W), x = logits * scale - shift;
      const Target<A> y = target(load(t + c * W));
      const vec es = a.exp_soft(x), apart = y.logits - x, kept = D::kept(es, y.e, apart);
      student += es;
      teacher += y.e;
      difference += term_of<D>(es, kept, apart, logits == -INFINITY, y.is_excluded);
      shifted += x;
      store(es, s + c * W);
      store(kept, t + c * W);
      if (a.rates.has_hard) {
        const vec eh = a.exp_hard(x);
        hard += eh;
        store(eh, h + c * W);
      }
    }
    rows.student += student;
    rows.teacher += teacher;
    rows.hard += hard;
    rows.difference += difference;
    rows.shifted += shifted;
  });
  if constexpr (D::kNormalizes) lane_terms(of, a, rows);
  const auto k = finish<D>(rows, a, first_row, lanes);
  if (!a.to_student) return;
  for (int64_t c = 0; c < a.classes; ++c)
    store(of.template gradient<D>(k, [&](const A* e) { return load(e + c * W); }), s + c * W);
  for (int lane = 0; a.labels && lane < lanes; ++lane) {
    if (a.ignores(first_row + lane))
      for (int64_t c = 0; c < a.classes; ++c) s[c * W + lane] = 0;
    else
      s[a.labels[first_row + lane] * W + lane] -= k.label;
  }
}

// One class of a tile to and from its vectors of rows, `step` elements apart. Classes lie too far
// apart for the processor to see the next one coming: it is asked for a few classes ahead.
template <class A>
void gather_class(const Tensor& from, int64_t offset, int64_t class_stride, int n, A* to,
                  int64_t step) {
  with_storage(from.dtype, [&](auto* storage) {
    auto* p = at<std::remove_pointer_t<decltype(storage)>>(from, offset);
    // Lanes beyond the last row compute on zeros, and are not written.
    over_vectors<A>(n, [&](int i, auto lanes) {
      fetch(p + kClassesAhead * class_stride + i, All<A>::value);
      store(load_lanes<A>(p + i, lanes, A(0)), to + i / All<A>::value * step);
    });
  });
}

template <class A>
void scatter_class(const A* from, int64_t step, int n, const Tensor& to, int64_t offset) {
  with_storage(to.dtype, [&](auto* storage) {
    auto* p = at<std::remove_pointer_t<decltype(storage)>>(to, offset);
    over_vectors<A>(n, [&](int i, auto lanes) {
      store_lanes<A>(load(from + i / All<A>::value * step), p + i, lanes);
    });
  });
}

template <class D, class A>
void forward_columns(const Arguments<A>& a, int threads) {
  constexpr int W = Simd<A>::width;
  const int64_t side = a.rows.columns(), width = thresholds.columns, classes = a.classes;
  const int64_t tiles = (side + width - 1) / width, outer = a.rows.count / side;
  const int64_t capacity = classes * width,
                step = classes * W;  // from one vector of rows to the next
  parallel_for(outer * tiles, threads, [&](int64_t tile) {
    const int64_t column = tile % tiles * width, row = tile / tiles * side + column;
    const int n = int(side - column < width ? side - column : width);
    A *s = scratch<A>(3 * capacity), *t = s + capacity, *h = t + capacity;
    const auto gather_tile = [&](size_t which, A* to) {
      const Side& from = a.rows.sides[which];
      const int64_t offset = a.rows.offset(from, row), stride = from.class_stride;
      for (int64_t c = 0; c < classes; ++c)
        gather_class(*from.tensor, offset + c * stride, stride, n, to + c * W, step);
    };
    if (a.teachers == 1) gather_tile(kTeacher, t);
    for (int64_t m = 0; a.teachers > 1 && m < a.teachers; ++m) {
      gather_tile(size_t(kTeacher + m), s);
      for (int64_t at = 0; at * W < n; ++at)
        teacher_lanes(s + at * step, a, a.p.weights[size_t(m)], m == 0, t + at * step);
    }
    gather_tile(kStudent, s);
    for (int i = 0; i < n; i += W) {
      const int64_t at = i / W * step;
      const Exponentials<A> of{s + at, t + at, h + at};
      const int lanes = n - i < W ? n - i : W;
      if (a.teachers == 1) {
        const vec_t<A> maximum = maximum_lanes(of.kept, classes);
        const vec_t<A> shift = maximum * A(kLogitScale);
        const auto target = [&](vec_t<A> logits) {
          const vec_t<A> y = logits * A(kLogitScale) - shift;
          return Target<A>{a.exp_soft(y), y, logits == -INFINITY};
        };
        forward_lanes<D>(of, maximum, target, a, row + i, lanes);
      } else {
        const A temperature = A(1 / a.rates.inverse * kLogitScale);
        const auto target = [&](vec_t<A> u) {
          return Target<A>{u, logits_of<A>(u, temperature), excludes<A>(u)};
        };
        forward_lanes<D>(of, vec_t<A>{}, target, a, row + i, lanes);
      }
    }
    if (!a.to_student) return;
    const Side& to = a.rows.sides[kToStudent];
    const int64_t offset = a.rows.offset(to, row);
    for (int64_t c = 0; c < classes; ++c)
      scatter_class(s + c * W, step, n, *to.tensor, offset + c * to.class_stride);
  });
}

}  // namespace fastkd::FASTKD_ISA
