// Vectors of 16 bytes as a whole: in half precision one instruction serves two elements.
#pragma once

#include "device.h"

namespace fastkd::cuda {

#ifdef __CUDACC__
__device__ __forceinline__ __nv_bfloat162 pair_of(__nv_bfloat16 low, __nv_bfloat16 high) {
  return {low, high};
}
__device__ __forceinline__ __half2 pair_of(__half low, __half high) { return {low, high}; }

// The upper half of a word is the float's own; the lower one is shifted there.
__device__ __forceinline__ float2 widen(__nv_bfloat162 pair) {
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 widen(__half2 pair) { return __half22float2(pair); }

__device__ __forceinline__ void narrow(float2 x, __nv_bfloat162& to) {
  to = __float22bfloat162_rn(x);
}
__device__ __forceinline__ void narrow(float2 x, __half2& to) { to = __float22half2_rn(x); }
#endif

// The largest element of V vectors; any number is larger than NaN.
template <class S, int N, int V>
__device__ __forceinline__ float largest_of(const Vector<S, N> (&vectors)[V]) {
#ifdef __CUDACC__
  if constexpr (sizeof(S) == 2) {
    auto largest = pair_of(vectors[0].values[0], vectors[0].values[1]);
#pragma unroll
    for (const Vector<S, N>& v : vectors)
#pragma unroll
      for (int k = 0; k < N; k += 2)
        largest = __hmax2(largest, pair_of(v.values[k], v.values[k + 1]));
    const float2 found = widen(largest);
    return fmaxf(found.x, found.y);
  } else
#endif
  {
    float largest = -INFINITY;
#pragma unroll
    for (const Vector<S, N>& v : vectors)
#pragma unroll
      for (S x : v.values) largest = fmaxf(largest, widen(x));
    return largest;
  }
}

// And the smallest of one.
template <class S, int N>
__device__ __forceinline__ float smallest_of(const Vector<S, N>& v) {
#ifdef __CUDACC__
  if constexpr (sizeof(S) == 2) {
    auto smallest = pair_of(v.values[0], v.values[1]);
#pragma unroll
    for (int k = 2; k < N; k += 2)
      smallest = __hmin2(smallest, pair_of(v.values[k], v.values[k + 1]));
    const float2 found = widen(smallest);
    return fminf(found.x, found.y);
  } else
#endif
  {
    float smallest = INFINITY;
#pragma unroll
    for (S x : v.values) smallest = fminf(smallest, widen(x));
    return smallest;
  }
}

template <class S, int N>
__device__ __forceinline__ void widen_all(const Vector<S, N>& v, float (&to)[N]) {
#ifdef __CUDACC__
  if constexpr (sizeof(S) == 2) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      const float2 found = widen(pair_of(v.values[k], v.values[k + 1]));
      to[k] = found.x;
      to[k + 1] = found.y;
    }
  } else
#endif
  {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = widen(v.values[k]);
  }
}

template <class S, int N>
__device__ __forceinline__ Vector<S, N> narrow_all(const float (&x)[N]) {
  Vector<S, N> v;
#ifdef __CUDACC__
  if constexpr (sizeof(S) == 2) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      auto pair = pair_of(S{}, S{});
      narrow({x[k], x[k + 1]}, pair);
      v.values[k] = pair.x;
      v.values[k + 1] = pair.y;
    }
  } else
#endif
  {
#pragma unroll
    for (int k = 0; k < N; ++k) v.values[k] = narrow<S>(x[k]);
  }
  return v;
}

// The largest number of the warp's lanes, in every lane: integers are compared in one instruction,
// in whose order those of floats are once a negative one's lower bits are flipped.
__device__ __forceinline__ float warp_max(float x) {
  const auto flipped = [](int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  return __int_as_float(flipped(__reduce_max_sync(kAllLanes, flipped(__float_as_int(x)))));
}

}  // namespace fastkd::cuda
