// A thread's stage in shared memory, to which vectors of logits are copied before they are needed:
// planes of 16 bytes a thread.
#pragma once

#include <cuda_pipeline.h>

#include "soft_target_vectors.h"

namespace fastkd::cuda::logits {

// Planes of a vector of so many classes.
template <class S>
constexpr int planes_of(int classes) {
  return classes * int(sizeof(S)) / kAccess;
}
template <>
constexpr int planes_of<Any>(int classes) {
  return classes * int(sizeof(float)) / kAccess;
}

// Where a vector of one side is, or a stage as a whole.
struct Stage {
  char* data;
  int plane_bytes;

  __device__ __forceinline__ Stage plane(int p) const {
    return {data + p * plane_bytes, plane_bytes};
  }

  template <class E>
  __device__ __forceinline__ void put(int k, E x) const {
    constexpr int kWidth = kAccess / sizeof(E);
    reinterpret_cast<E*>(data + k / kWidth * plane_bytes)[k % kWidth] = x;
  }

  template <class E>
  __device__ __forceinline__ E get(int k) const {
    constexpr int kWidth = kAccess / sizeof(E);
    return reinterpret_cast<const E*>(data + k / kWidth * plane_bytes)[k % kWidth];
  }

  // Starts to copy a vector that lies in the row as a whole.
  template <class S, int N>
  __device__ __forceinline__ void fetch_whole(const Tensor& from, int64_t row, int i) const {
    as_storage<S>(from.dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
      constexpr int kWidth = kAccess / sizeof(E);
      const E* const source = reinterpret_cast<const E*>(from.data) + row + i;
#pragma unroll
      for (int p = 0; p < N / kWidth; ++p)
        __pipeline_memcpy_async(data + p * plane_bytes, source + p * kWidth, kAccess);
    });
  }

  // Copies any other vector; outside of the row there are excluded classes.
  template <class S, int N>
  __device__ __forceinline__ void fetch_elements(const Tensor& from, int64_t row, int i,
                                                 int classes) const {
    as_storage<S>(from.dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
      const E* const source = reinterpret_cast<const E*>(from.data) + row;
#pragma unroll 1
      for (int k = 0; k < N; ++k)
        put<E>(k, i + k >= 0 && i + k < classes ? source[(i + k) * from.class_stride]
                                                : narrow<E>(-INFINITY));
    });
  }

  template <class S, int N>
  __device__ __forceinline__ void load_to(DType dtype, float* to) const {
    as_storage<S>(dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
      constexpr int kWidth = kAccess / sizeof(E);
#pragma unroll
      for (int p = 0; p < N / kWidth; ++p) {
        const auto v = load<kWidth>(reinterpret_cast<const E*>(data + p * plane_bytes));
#pragma unroll
        for (int k = 0; k < kWidth; ++k) to[p * kWidth + k] = widen(v.values[k]);
      }
    });
  }
};

}  // namespace fastkd::cuda::logits
