// Gradients of what logits were before they were capped.
#pragma once

#include "../softcap.h"
#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

// Of `n` classes of a row from `first` on, from the gradients of the logits of this side, which are
// read once more: the gradient must not have taken their place yet.
template <class A>
void uncap(const Arguments<A>& a, int which, int64_t row, int64_t first, int n, A* gradient) {
  const double cap = which == kStudent ? a.p.softcap : a.p.teacher_softcap;
  if (cap == 0) return;
  const Side& side = a.rows.sides[size_t(which)];
  const int64_t stride = side.class_stride;
  alignas(64) A logits[kMostBlock];
  gather(*side.tensor, a.rows.offset(side, row) + first * stride, stride, n, logits);
  const Softcap<A> softcap(cap);
  over_vectors<A>(n, [&](int i, auto lanes) {
    const vec_t<A> by = softcap.slope(load_lanes<A>(logits + i, lanes, A(0)));
    store_lanes<A>(load_lanes<A>(gradient + i, lanes, A(0)) * by, gradient + i, lanes);
  });
}

}  // namespace fastkd::FASTKD_ISA
