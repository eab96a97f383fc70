// Soft targets where rows lie side by side and classes apart (dim=1 of N, C, H, W): a vector holds
// one class of as many rows as it has lanes, so nothing is transposed or summed across lanes.
#pragma once

#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

constexpr int kColumns = 128;  // rows per tile: 8 cache lines of float32 per class
constexpr int kClassesAhead = 4;
constexpr int64_t kMostColumnClasses = 4096;  // tiles of more do not stay in cache

// One vector of rows, class after class; s, t and h become the exponentials, s then the gradient.
template <class A>
void forward_lanes(A* s, A* t, A* h, const Plan<A>& plan, const int64_t* labels, int lanes,
                   int64_t ignore_index, A* table, bool write) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const vec infinity = splat<A>(INFINITY), zero = splat<A>(0);
  vec s_max = -infinity, t_max = -infinity;
  for (int64_t c = 0; c < plan.classes; ++c) {
    s_max = max<A>(load(s + c * W), s_max);
    t_max = max<A>(load(t + c * W), t_max);
  }
  vec s_sum = zero, t_sum = zero, h_sum = zero, difference = zero, shifted = zero;
  A logits[W] = {};
  for (int lane = 0; labels && lane < lanes; ++lane)
    if (labels[lane] != ignore_index) logits[lane] = s[labels[lane] * W + lane];
  // Sums of sums, so that many classes do not add up many roundings.
  for (int64_t first = 0; first < plan.classes; first += 32) {
    const int64_t last = first + 32 < plan.classes ? first + 32 : plan.classes;
    vec s_part = zero, t_part = zero, h_part = zero, difference_part = zero, shifted_part = zero;
    for (int64_t c = first; c < last; ++c) {
      const vec raw_s = load(s + c * W), raw_t = load(t + c * W);
      const vec x = raw_s - s_max, y = raw_t - t_max;
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
    s_sum += s_part;
    t_sum += t_part;
    h_sum += plan.third_exponential ? h_part : s_part;
    difference += difference_part;
    shifted += shifted_part;
  }

  // All lanes at once first: a row has few classes here, and its logarithms would take most of the
  // time one by one.
  alignas(64) A zs[W], zt[W], zh[W], kl[W], a[W], b[W], k[W] = {};
  double log_hard[W] = {};
  store(s_sum, zs);
  store(t_sum, zt);
  store(h_sum, zh);
  store(difference, kl);
  for (int lane = 0; lane < W; ++lane) {
    const double student = zs[lane], teacher = zt[lane];
    kl[lane] = A(double(kl[lane]) / teacher * plan.inverse_temperature + log_of(student / teacher));
    a[lane] = A(plan.soft_gradient / student);
    b[lane] = A(plan.soft_gradient / teacher);
  }
  for (int lane = 0; plan.hard && lane < W; ++lane) {
    log_hard[lane] = log_of(zh[lane]);
    k[lane] = A(plan.hard_gradient / double(zh[lane]));
  }
  for (int lane = 0; lane < lanes; ++lane) {
    A* row = table + lane * kCount;
    if (labels && labels[lane] == ignore_index) {
      for (int i = 0; i < kCount; ++i) row[i] = 0;
      continue;
    }
    row[kStudentMax] = s_max[lane];
    row[kStudentSum] = zs[lane];
    row[kTeacherMax] = t_max[lane];
    row[kTeacherSum] = zt[lane];
    row[kHardSum] = plan.hard ? zh[lane] : 0;
    row[kKl] = kl[lane] < 0 ? 0 : kl[lane];
    row[kCe] = 0;
    if (plan.hard) {
      const double log_sum = log_hard[lane];
      row[kCe] = A(plan.cross_entropy(log_sum - (double(logits[lane]) - s_max[lane]),
                                      log_sum - double(shifted[lane]) / double(plan.classes)));
    }
  }
  if (!write) return;
  vec to_student = load(a);
  if (plan.hard && !plan.third_exponential) to_student += load(k);
  const A smoothing = A(plan.hard_gradient * plan.smoothing / double(plan.classes));
  for (int64_t c = 0; c < plan.classes; ++c) {
    vec g = load(s + c * W) * to_student;
    if (plan.soft_gradient != 0) g -= load(t + c * W) * load(b);
    if (plan.third_exponential) g += load(h + c * W) * load(k);
    store(g - smoothing, s + c * W);
  }
  for (int lane = 0; labels && lane < lanes; ++lane) {
    if (labels[lane] == ignore_index)
      for (int64_t c = 0; c < plan.classes; ++c) s[c * W + lane] = 0;
    else
      s[labels[lane] * W + lane] -= A(plan.hard_gradient * (1 - plan.smoothing));
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

template <class A>
void forward_columns(const Tensors& t, const Rows<3>& rows, const Plan<A>& plan,
                     const int64_t* labels, int64_t ignore_index, A* table, int threads) {
  constexpr int W = Simd<A>::width;
  const int64_t side = rows.columns(), tiles = (side + kColumns - 1) / kColumns;
  const int64_t outer = rows.count / side, room = plan.classes * kColumns;
  const auto& strides = rows.class_stride;
  const int64_t step = plan.classes * W;  // from one vector of rows to the next
  parallel_for(outer * tiles, threads, [&](int64_t tile) {
    const int64_t column = tile % tiles * kColumns, row = tile / tiles * side + column;
    const int n = int(side - column < kColumns ? side - column : kColumns);
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
                    n - i < W ? n - i : W, ignore_index, table + (row + i) * kCount,
                    bool(t.gradient));
    }
    if (t.gradient)
      for (int64_t c = 0; c < plan.classes; ++c)
        scatter_class(s + c * W, step, n, *t.gradient, offset[2] + c * strides[2]);
  });
}

}  // namespace fastkd::FASTKD_ISA
