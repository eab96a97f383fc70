// Soft targets where rows lie side by side and classes apart (dim=1 of N, C, H, W): a vector holds
// one class of as many rows as it has lanes, so nothing is transposed or summed across lanes.
#pragma once

#include "soft_target_lanes.h"

namespace fastkd::FASTKD_ISA {

constexpr int kClassesAhead = 4;

// The statistics of one vector of rows, whose exponentials are s, t and h, and the gradient in the
// place of s.
template <class A>
void finish_lanes(const Lanes<A>& rows, A* s, A* t, A* h, const Plan<A>& plan,
                  const int64_t* labels, int lanes, A* table, bool write) {
  constexpr int W = Simd<A>::width;
  const auto k = finish(rows, plan, labels, lanes, table);
  if (!write) return;
  for (int64_t c = 0; c < plan.classes; ++c) {
    const auto of_class = [&](const A* e) { return load(e + c * W); };
    store(k(of_class, Exponentials<A>{s, t, h}), s + c * W);
  }
  for (int lane = 0; labels && lane < lanes; ++lane) {
    if (plan.ignores(labels, lane))
      for (int64_t c = 0; c < plan.classes; ++c) s[c * W + lane] = 0;
    else
      s[labels[lane] * W + lane] -= plan.to_label();
  }
}

// One vector of rows, class after class; s, t and h become the exponentials, s then the gradient.
template <class A>
void forward_lanes(A* s, A* t, A* h, const Plan<A>& plan, const int64_t* labels, int lanes,
                   A* table, bool write) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const vec infinity = splat<A>(INFINITY), zero = splat<A>(0);
  vec s_max = -infinity, t_max = -infinity;
  for (int64_t c = 0; c < plan.classes; ++c) {
    s_max = max<A>(load(s + c * W), s_max);
    t_max = max<A>(load(t + c * W), t_max);
  }
  const A scale = A(kLogitScale);
  const vec s_shift = s_max * scale, t_shift = t_max * scale;
  Lanes<A> rows{s_max, t_max, zero, zero, zero, zero, zero, {}};
  for (int lane = 0; labels && lane < lanes; ++lane)
    if (!plan.ignores(labels, lane)) rows.label[lane] = s[labels[lane] * W + lane];
  // Sums of sums, so that many classes do not add up many roundings.
  for (int64_t first = 0; first < plan.classes; first += 32) {
    const int64_t last = first + 32 < plan.classes ? first + 32 : plan.classes;
    vec s_part = zero, t_part = zero, h_part = zero, difference_part = zero, shifted_part = zero;
    for (int64_t c = first; c < last; ++c) {
      const vec raw_s = load(s + c * W), raw_t = load(t + c * W);
      const vec x = raw_s * scale - s_shift, y = raw_t * scale - t_shift;
      const vec es = plan.softened(x), et = plan.softened(y);
      const vec product = raw_s == -infinity ? infinity : et * (y - x);
      s_part += es;
      t_part += et;
      difference_part += raw_t == -infinity ? zero : product;
      shifted_part += x;
      store(es, s + c * W);
      store(et, t + c * W);
      if (plan.third_exponential) {
        const vec eh = plan.sharp(x);
        h_part += eh;
        store(eh, h + c * W);
      }
    }
    rows.student_sum += s_part;
    rows.teacher_sum += t_part;
    rows.hard_sum += plan.third_exponential ? h_part : s_part;
    rows.difference += difference_part;
    rows.shifted += shifted_part;
  }
  finish_lanes(rows, s, t, h, plan, labels, lanes, table, write);
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

template <class A>
void forward_columns(const Tensors& t, const Rows<3>& rows, const Plan<A>& plan,
                     const int64_t* labels, A* table, int threads) {
  constexpr int W = Simd<A>::width;
  const int64_t side = rows.columns(), width = thresholds.columns;
  const int64_t tiles = (side + width - 1) / width;
  const int64_t outer = rows.count / side, room = plan.classes * width;
  const auto& strides = rows.class_stride;
  const int64_t step = plan.classes * W;  // from one vector of rows to the next
  parallel_for(outer * tiles, threads, [&](int64_t tile) {
    const int64_t column = tile % tiles * width, row = tile / tiles * side + column;
    const int n = int(side - column < width ? side - column : width);
    int64_t offset[3];
    rows.offsets(row, offset);
    A *s = scratch<A>(3 * room), *y = s + room, *h = y + room;
    for (int64_t c = 0; c < plan.classes; ++c) {
      gather_class(*t.student, offset[0] + c * strides[0], strides[0], n, s + c * W, step);
      gather_class(*t.teacher, offset[1] + c * strides[1], strides[1], n, y + c * W, step);
    }
    for (int i = 0; i < n; i += W) {
      const int64_t of = i / W * step;
      forward_lanes(s + of, y + of, h + of, plan, labels ? labels + row + i : nullptr,
                    n - i < W ? n - i : W, table + (row + i) * kCount, bool(t.gradient));
    }
    if (t.gradient)
      for (int64_t c = 0; c < plan.classes; ++c)
        scatter_class(s + c * W, step, n, *t.gradient, offset[2] + c * strides[2]);
  });
}

}  // namespace fastkd::FASTKD_ISA
