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
    if (stride != 1) {
      for (int i = 0; i < n; ++i) to[i] = A(widen(p[i * stride]));
      return;
    }
    over_vectors<A>(n, [&](int i, auto lanes) {
      store_lanes<A>(load_lanes<A>(p + i, lanes, A(0)), to + i, lanes);
    });
  });
}

template <class A>
inline void scatter(const A* from, int n, const Tensor& to, int64_t offset, int64_t stride) {
  with_storage(to.dtype, [&](auto* storage) {
    auto* p = at<std::remove_pointer_t<decltype(storage)>>(to, offset);
    if (stride != 1) {
      for (int i = 0; i < n; ++i) narrow(from[i], p + i * stride);
      return;
    }
    write_vectors<A>(p, n, to.streams,
                     [&](int i, auto lanes) { return load_lanes<A>(from + i, lanes, A(0)); });
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
