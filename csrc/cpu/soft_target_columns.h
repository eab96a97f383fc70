// Soft targets where rows lie side by side and classes apart (dim=1 of N, C, H, W): a vector holds
// one class of as many rows as it has lanes, so nothing is transposed or summed across lanes.
#pragma once

#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

constexpr int kColumns = 128;                 // rows per tile: 8 cache lines of float32 per class
constexpr int64_t kMostColumnClasses = 4096;  // tiles of more do not stay in cache

// One vector of rows; s, t and h are a tile's columns, which become their exponentials.
template <class A>
void forward_lanes(A* s, A* t, A* h, const Plan<A>& plan, const int64_t* labels, int lanes,
                   int64_t ignore_index, A* table, bool write) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const vec infinity = splat<A>(INFINITY), zero = splat<A>(0);
  vec s_max = -infinity, t_max = -infinity;
  for (int64_t c = 0; c < plan.classes; ++c) {
    s_max = max<A>(load(s + c * kColumns), s_max);
    t_max = max<A>(load(t + c * kColumns), t_max);
  }
  vec s_sum = zero, t_sum = zero, h_sum = zero, difference = zero, shifted = zero;
  A logits[W] = {};
  for (int lane = 0; labels && lane < lanes; ++lane)
    if (labels[lane] != ignore_index) logits[lane] = s[labels[lane] * kColumns + lane];
  // Sums of sums, so that many classes do not add up many roundings.
  for (int64_t first = 0; first < plan.classes; first += 32) {
    const int64_t last = first + 32 < plan.classes ? first + 32 : plan.classes;
    vec s_part = zero, t_part = zero, h_part = zero, difference_part = zero, shifted_part = zero;
    for (int64_t c = first; c < last; ++c) {
      const vec raw_s = load(s + c * kColumns), raw_t = load(t + c * kColumns);
      const vec x = raw_s - s_max, y = raw_t - t_max;
      const vec es = plan.softened(x), et = plan.softened(y);
      const vec product = raw_s == -infinity ? infinity : et * (y - x);
      s_part += es;
      t_part += et;
      difference_part += raw_t == -infinity ? zero : product;
      shifted_part += x;
      store(es, s + c * kColumns);
      store(et, t + c * kColumns);
      if (plan.third_exponential) {
        const vec eh = plan.sharp(x);
        h_part += eh;
        store(eh, h + c * kColumns);
      }
    }
    s_sum += s_part;
    t_sum += t_part;
    h_sum += plan.third_exponential ? h_part : s_part;
    difference += difference_part;
    shifted += shifted_part;
  }

  vec a = zero, b = zero, k = zero;
  for (int lane = 0; lane < lanes; ++lane) {
    A* row = table + lane * kCount;
    if (labels && labels[lane] == ignore_index) {
      for (int i = 0; i < kCount; ++i) row[i] = 0;
      continue;
    }
    const double zs = s_sum[lane], zt = t_sum[lane], zh = h_sum[lane];
    const double kl = double(difference[lane]) / zt * plan.inverse_temperature + std::log(zs / zt);
    row[kStudentMax] = s_max[lane];
    row[kStudentSum] = A(zs);
    row[kTeacherMax] = t_max[lane];
    row[kTeacherSum] = A(zt);
    row[kHardSum] = plan.hard ? A(zh) : 0;
    row[kKl] = A(kl < 0 ? 0 : kl);
    row[kCe] = 0;
    a[lane] = A(plan.soft_gradient / zs);
    b[lane] = A(plan.soft_gradient / zt);
    if (plan.hard) {
      const double log_sum = std::log(zh);
      row[kCe] = A(plan.cross_entropy(log_sum - (double(logits[lane]) - s_max[lane]),
                                      log_sum - double(shifted[lane]) / double(plan.classes)));
      k[lane] = A(plan.hard_gradient / zh);
    }
  }
  if (!write) return;
  if (plan.hard && !plan.third_exponential) a += k;
  const A smoothing = A(plan.hard_gradient * plan.smoothing / double(plan.classes));
  for (int64_t c = 0; c < plan.classes; ++c) {
    vec g = load(s + c * kColumns) * a;
    if (plan.soft_gradient != 0) g -= load(t + c * kColumns) * b;
    if (plan.third_exponential) g += load(h + c * kColumns) * k;
    store(g - smoothing, s + c * kColumns);
  }
  for (int lane = 0; labels && lane < lanes; ++lane) {
    if (labels[lane] == ignore_index)
      for (int64_t c = 0; c < plan.classes; ++c) s[c * kColumns + lane] = 0;
    else
      s[labels[lane] * kColumns + lane] -= A(plan.hard_gradient * (1 - plan.smoothing));
  }
}

template <class A>
void forward_columns(const Tensors& t, const Rows<3>& rows, const Plan<A>& plan,
                     const int64_t* labels, int64_t ignore_index, A* table, int threads) {
  constexpr int W = Simd<A>::width;
  const int64_t side = rows.columns(), tiles = (side + kColumns - 1) / kColumns;
  const int64_t outer = rows.count / side, room = plan.classes * kColumns;
  parallel_for(outer * tiles, threads, [&](int64_t tile) {
    const int64_t column = tile % tiles * kColumns, row = tile / tiles * side + column;
    const int n = int(side - column < kColumns ? side - column : kColumns);
    int64_t at[3];
    rows.offsets(row, at);
    A *s = scratch<A>(3 * room), *y = s + room, *h = y + room;
    for (int64_t c = 0; c < plan.classes; ++c) {
      gather(*t.student, at[0] + c * rows.class_stride[0], 1, n, s + c * kColumns);
      gather(*t.teacher, at[1] + c * rows.class_stride[1], 1, n, y + c * kColumns);
      // Lanes beyond the last row compute on zeros, and are not written.
      for (int i = n; i < (n + W - 1) / W * W; ++i) s[c * kColumns + i] = y[c * kColumns + i] = 0;
    }
    for (int i = 0; i < n; i += W)
      forward_lanes(s + i, y + i, h + i, plan, labels ? labels + row + i : nullptr,
                    n - i < W ? n - i : W, ignore_index, table + (row + i) * kCount,
                    bool(t.gradient));
    if (t.gradient)
      for (int64_t c = 0; c < plan.classes; ++c)
        scatter(s + c * kColumns, n, *t.gradient, at[2] + c * rows.class_stride[2], 1);
  });
}

}  // namespace fastkd::FASTKD_ISA
