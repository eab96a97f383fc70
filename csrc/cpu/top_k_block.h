// A block of the student's logits, where the teacher kept k classes: brought into arithmetic
// precision, so that the listed ones can be taken out of it.
#pragma once

#include "exponential.h"
#include "rows.h"
#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

// Bytes between the block that is computed and what is fetched meanwhile: a block or two. Bringing
// a block reads memory and does nothing else, so the rest of the time must read, too.
constexpr int64_t kAhead = 8192;

// The logits of a block in arithmetic precision.
template <class A>
void bring(const Side& side, int64_t offset, int n, A* to) {
  with_storage(side.tensor->dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    const S* const from = at<S>(*side.tensor, offset);
    const int64_t stride = side.class_stride;
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = A(widen(from[i * stride]));
      return;
    }
    over_vectors<A>(n, [&](int i, auto lanes) {
      store_lanes<A>(load_lanes<A>(from + i, lanes, A(0)), to + i, lanes);
    });
  });
}

template <class A>
A largest_of(const A* of, int n) {
  vec_t<A> found = splat<A>(-INFINITY);
  over_vectors<A>(n, [&](int i, auto lanes) {
    found = max<A>(load_lanes<A>(of + i, lanes, A(-INFINITY)), found);
  });
  return max_of<A>(found);
}

// Of the logits, scaled, for label smoothing. A large one that all have in common goes first.
template <class A>
double sum_of_logits(const A* of, int n) {
  const A scale = A(kLogitScale), by = shift(largest_of(of, n));
  vec_t<A> found = {};
  over_vectors<A>(n, [&](int i, auto lanes) {
    found += keep<A>(load_lanes<A>(of + i, lanes, A(0)) * scale - by, lanes);
  });
  return double(sum<A>(found)) + n * double(by);
}

// The sum of exp(rate · (x − maximum)) of a block, which are left at `to`. For each of its vectors
// `step` bytes from `ahead` on are fetched.
template <class A>
double exponentiate(const A* from, int n, A maximum, const Exp<A> exp, A* to, const char* ahead,
                    int step) {
  const A origin = maximum == A(-INFINITY) ? 0 : maximum;
  double total = 0;
  over_pieces<A>(n, [&](int first, int size) {
    vec_t<A> found = {};
    over_vectors<A>(size, [&](int j, auto lanes) {
      const int i = first + j;
      __builtin_prefetch(ahead + i / Simd<A>::width * step, 0, 2);
      const vec_t<A> e = exp(load_lanes<A>(from + i, lanes, A(-INFINITY)) - origin);
      found += e;
      store_lanes<A>(e, to + i, lanes);
    });
    total += sum<A>(found);
  });
  return total;
}

}  // namespace fastkd::FASTKD_ISA
