// Stretches of a tensor to and from arithmetic precision, whatever their dtype and stride.
#pragma once

#include "storage.h"

namespace fastkd::FASTKD_ISA {

template <class S>
inline S* at(const Tensor& t, int64_t offset) {
  return reinterpret_cast<S*>(t.data) + offset;
}

template <class A>
inline void gather(const Tensor& from, int64_t offset, int64_t stride, int n, A* to) {
  with_storage(from.dtype, [&](auto* storage) {
    auto* p = at<std::remove_pointer_t<decltype(storage)>>(from, offset);
    constexpr int W = Simd<A>::width;
    if (stride != 1) {
      for (int i = 0; i < n; ++i) to[i] = A(widen(p[i * stride]));
      return;
    }
    int i = 0;
    for (; i + W <= n; i += W) store(load_as<A>(p + i), to + i);
    if (i < n) store_part(load_part<A>(p + i, n - i, A(0)), to + i, n - i);
  });
}

template <class A>
inline void scatter(const A* from, int n, const Tensor& to, int64_t offset, int64_t stride) {
  with_storage(to.dtype, [&](auto* storage) {
    auto* p = at<std::remove_pointer_t<decltype(storage)>>(to, offset);
    constexpr int W = Simd<A>::width;
    if (stride != 1) {
      for (int i = 0; i < n; ++i) narrow(from[i], p + i * stride);
      return;
    }
    int i = 0;
    if (to.streams) {
      i = until_aligned<A>(p, n);
      store_part(load_part<A>(from, i, A(0)), p, i);
      for (; i + W <= n; i += W) stream(load(from + i), p + i);
    }
    for (; i + W <= n; i += W) store(load(from + i), p + i);
    if (i < n) store_part(load_part<A>(from + i, n - i, A(0)), p + i, n - i);
  });
}

// Multiplies a dense gradient by a scalar. Only for dtypes in which that rounds once too finely to
// matter; half precision is computed anew instead.
template <class A>
inline void scale_stretch(const Tensor& gradient, int64_t begin, int64_t end, A factor) {
  with_storage(gradient.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if constexpr (sizeof(S) >= 4) {
      S* p = at<S>(gradient, 0);
      for (int64_t i = begin; i < end; ++i) p[i] = S(p[i] * factor);
    }
  });
}

}  // namespace fastkd::FASTKD_ISA
