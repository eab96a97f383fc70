// Stretches of a tensor to and from arithmetic precision, whatever their dtype and stride; and
// memory asked for before it is needed.
#pragma once

#include "storage.h"

namespace fastkd::FASTKD_ISA {

template <class S>
inline S* at(const Tensor& t, int64_t offset) {
  return reinterpret_cast<S*>(t.data) + offset;
}

constexpr int kLine = 64;  // bytes that the cache moves together

// Fetches as much as n elements at `p` take, `distance` bytes further on, into the second-level
// cache.
template <class S>
inline void fetch(const S* p, int n, int64_t distance = 0) {
  const char* from = reinterpret_cast<const char*>(p) + distance;
  for (int64_t i = 0; i < n * int64_t(sizeof(S)); i += kLine) __builtin_prefetch(from + i, 0, 2);
}

template <class A>
inline void gather(const Tensor& from, int64_t offset, int64_t stride, int64_t n, A* to) {
  with_storage(from.dtype, [&](auto* storage) {
    auto* p = at<std::remove_pointer_t<decltype(storage)>>(from, offset);
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = A(widen(p[i * stride]));
      return;
    }
    over_vectors<A>(n, [&](int64_t i, auto lanes) {
      store_lanes<A>(load_lanes<A>(p + i, lanes, A(0)), to + i, lanes);
    });
  });
}

template <class A>
inline void scatter(const A* from, int64_t n, const Tensor& to, int64_t offset, int64_t stride) {
  with_storage(to.dtype, [&](auto* storage) {
    auto* p = at<std::remove_pointer_t<decltype(storage)>>(to, offset);
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) narrow(from[i], p + i * stride);
      return;
    }
    write_vectors<A>(p, n, to.non_temporal,
                     [&](int64_t i, auto lanes) { return load_lanes<A>(from + i, lanes, A(0)); });
  });
}

}  // namespace fastkd::FASTKD_ISA
