// A thread's own places in shared memory, to which vectors of logits are fetched before they are
// needed: planes of 16 bytes a thread.
#pragma once

#include <cuda_pipeline.h>

#include "soft_target_forms.h"

namespace fastkd::cuda::logits {

template <class E>
__device__ __forceinline__ void put(char* slot, int plane_bytes, int k, E x) {
  constexpr int kWidth = kAccess / sizeof(E);
  reinterpret_cast<E*>(slot + k / kWidth * plane_bytes)[k % kWidth] = x;
}

// Starts to bring a vector that lies in the row as a whole to its slot.
template <class S, int N>
__device__ __forceinline__ void fetch(char* slot, int plane_bytes, const Tensor& from, int64_t row,
                                      int i) {
  as_storage<S>(from.dtype, [&](auto* storage) {
    using E = std::remove_pointer_t<decltype(storage)>;
    constexpr int kWidth = kAccess / sizeof(E);
    const E* const data = reinterpret_cast<const E*>(from.data) + row + i;
#pragma unroll
    for (int plane = 0; plane < N / kWidth; ++plane)
      __pipeline_memcpy_async(slot + plane * plane_bytes, data + plane * kWidth, kAccess);
  });
}

// Brings any other vector to its slot; outside of the row there are excluded classes.
template <class S, int N>
__device__ __forceinline__ void fetch_elements(char* slot, int plane_bytes, const Tensor& from,
                                               int64_t row, int i, int classes) {
  as_storage<S>(from.dtype, [&](auto* storage) {
    using E = std::remove_pointer_t<decltype(storage)>;
    const E* const data = reinterpret_cast<const E*>(from.data) + row;
#pragma unroll 1
    for (int k = 0; k < N; ++k)
      put<E>(
          slot, plane_bytes, k,
          i + k >= 0 && i + k < classes ? data[(i + k) * from.class_stride] : narrow<E>(-INFINITY));
  });
}

template <class S, int N>
__device__ __forceinline__ void take(const char* slot, int plane_bytes, DType dtype, float* to) {
  as_storage<S>(dtype, [&](auto* storage) {
    using E = std::remove_pointer_t<decltype(storage)>;
    constexpr int kWidth = kAccess / sizeof(E);
#pragma unroll
    for (int plane = 0; plane < N / kWidth; ++plane) {
      const auto v = load<kWidth>(reinterpret_cast<const E*>(slot + plane * plane_bytes));
#pragma unroll
      for (int k = 0; k < kWidth; ++k) to[plane * kWidth + k] = widen(v.values[k]);
    }
  });
}

}  // namespace fastkd::cuda::logits
