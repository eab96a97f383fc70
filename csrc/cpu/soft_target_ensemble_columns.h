// Soft targets from several teachers where rows lie side by side and classes apart, as in
// soft_target_columns.h.
#pragma once

#include "soft_target_columns.h"
#include "soft_target_ensemble.h"

namespace fastkd::FASTKD_ISA {

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

// One vector of rows, class after class: a teacher's share of the mean.
template <class A>
void teacher_lanes(A* t, const Plan<A>& plan, double weight, bool is_first, A* mean) {
  constexpr int W = Simd<A>::width;
  const vec_t<A> shift = maximum_lanes(t, plan.classes) * A(kLogitScale);
  vec_t<A> total = {};
  over_classes(plan.classes, [&](int64_t c, int64_t last) {
    vec_t<A> part = {};
    for (; c < last; ++c) {
      const vec_t<A> e = exponentials_of<A>(load(t + c * W), shift, plan.softened);
      part += e;
      store(e, t + c * W);
    }
    total += part;
  });
  const vec_t<A> share = A(weight) / total;
  for (int64_t c = 0; c < plan.classes; ++c) {
    const vec_t<A> u = load(t + c * W) * share;
    store(is_first ? u : load(mean + c * W) + u, mean + c * W);
  }
}

// The same rows of the student, when the mean is complete; s and h become the exponentials, s then
// the gradient.
template <class A>
void student_lanes(A* s, A* mean, A* h, const Plan<A>& plan, const int64_t* labels, int lanes,
                   A* table, bool write) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const A scale = A(kLogitScale), temperature = A(1 / plan.inverse_temperature * kLogitScale);
  Lanes<A> rows{};
  rows.student_max = maximum_lanes(s, plan.classes);
  const vec shift = rows.student_max * scale;
  for (int lane = 0; labels && lane < lanes; ++lane)
    if (!plan.ignores(labels, lane)) rows.label[lane] = s[labels[lane] * W + lane];
  over_classes(plan.classes, [&](int64_t c, int64_t last) {
    vec sum_e = {}, mass = {}, sum_hard = {}, difference = {}, shifted = {};
    for (; c < last; ++c) {
      const vec logits = load(s + c * W), x = logits * scale - shift, u = load(mean + c * W);
      const vec es = plan.softened(x);
      sum_e += es;
      mass += u;
      difference += difference_of<A>(u, logits, x, temperature);
      shifted += x;
      store(es, s + c * W);
      if (plan.third_exponential) {
        const vec eh = plan.sharp(x);
        sum_hard += eh;
        store(eh, h + c * W);
      }
    }
    rows.student_sum += sum_e;
    rows.teacher_sum += mass;
    rows.hard_sum += plan.third_exponential ? sum_hard : sum_e;
    rows.difference += difference;
    rows.shifted += shifted;
  });
  finish_lanes(rows, s, mean, h, plan, labels, lanes, table, write);
}

// Rows that lie side by side in every tensor, while their classes do not; `side` as Rows has it.
template <class A>
void ensemble_columns(const Ensemble& of, const Plan<A>& plan, int64_t side, const int64_t* labels,
                      A* table, int threads) {
  constexpr int W = Simd<A>::width;
  const int64_t width = thresholds.columns;
  const int64_t classes = plan.classes, room = classes * width, step = classes * W;
  const int64_t tiles = (side + width - 1) / width, outer = of.student.rows.count / side;
  parallel_for(outer * tiles, threads, [&](int64_t tile) {
    const int64_t column = tile % tiles * width, row = tile / tiles * side + column;
    const int n = int(side - column < width ? side - column : width);
    A *x = scratch<A>(3 * room), *mean = x + room, *h = mean + room;
    const auto gather_tile = [&](const Side& from) {
      for (int64_t c = 0; c < classes; ++c)
        gather_class(*from.tensor, from.offset(row) + c * from.stride(), from.stride(), n,
                     x + c * W, step);
    };
    for (size_t m = 0; m < of.teachers.size(); ++m) {
      gather_tile(of.teachers[m]);
      for (int64_t at = 0; at * W < n; ++at)
        teacher_lanes(x + at * step, plan, of.weights[m], m == 0, mean + at * step);
    }
    gather_tile(of.student);
    for (int i = 0; i < n; i += W) {
      const int64_t at = i / W * step;
      student_lanes(x + at, mean + at, h + at, plan, labels ? labels + row + i : nullptr,
                    n - i < W ? n - i : W, table + (row + i) * kCount, of.writes);
    }
    for (int64_t c = 0; of.writes && c < classes; ++c)
      scatter_class(x + c * W, step, n, *of.gradient.tensor,
                    of.gradient.offset(row) + c * of.gradient.stride());
  });
}

}  // namespace fastkd::FASTKD_ISA
