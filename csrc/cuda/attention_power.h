// |x|^p and its derivative, and what is kept of a position's channels: their sum or the largest.
#pragma once

#include "storage.h"

namespace fastkd::cuda::maps {

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
__device__ __forceinline__ float raised(float x, float p) { return powf(x, p); }
__device__ __forceinline__ double raised(double x, double p) { return pow(x, p); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
template <class A>
__device__ __forceinline__ A with_sign(A x, A sign) {
  return copysign(x, sign);
}

// p is 1 or 2.
template <class A>
struct Simple {
  bool is_square;

  __host__ explicit Simple(double p) : is_square(p == 2) {}

  __device__ __forceinline__ A operator()(A x) const {
    return magnitude(x) * (is_square ? magnitude(x) : A(1));
  }
  // p · |x|^(p−1) · sign(x), and 0 at 0
  __device__ __forceinline__ A derivative(A x) const {
    const A sign = x == A(0) || x != x ? x : with_sign(A(1), x);
    return is_square ? x + x : sign;
  }
};

// x^p of what is not negative. Multiples of a half up to 4 are products and square roots. A call:
// inlined, it would be there for each of the elements that a thread has in flight.
template <class A>
__device__ __attribute__((noinline)) A raise(A x, int halves, A p) {
  switch (halves) {
    case 0:
      return A(1);
    case 1:
      return root(x);
    case 2:
      return x;
    case 3:
      return x * root(x);
    case 4:
      return x * x;
    case 5:
      return x * x * root(x);
    case 6:
      return x * x * x;
    case 7:
      return x * x * x * root(x);
    case 8:
      return (x * x) * (x * x);
    default:
      return raised(x, p);
  }
}

template <class A>
__device__ __attribute__((noinline)) A power_of(A x, A p) {
  return raised(x, p);
}

// Any p.
template <class A>
struct General {
  A p;
  int halves;

  __host__ explicit General(double p)
      : p(A(p)), halves(p <= 4 && 2 * p == int(2 * p) ? int(2 * p) : -1) {}

  __device__ __forceinline__ A operator()(A x) const { return raise(magnitude(x), halves, p); }
  __device__ __forceinline__ A derivative(A x) const {
    const A size = raise(magnitude(x), halves - 2, p - A(1)) * p;
    return x == A(0) ? A(0) : x == x ? with_sign(size, x) : x;
  }
};

// Σ |x|^p
template <class A, class Raise_>
struct SumOf {
  using Raise = Raise_;
  static constexpr bool kHasArgmax = false;
  A value = 0;

  __device__ __forceinline__ void see(A x, int, const Raise& power) { value += power(x); }
  __device__ __forceinline__ void merge(const SumOf& other) { value += other.value; }
  __device__ __forceinline__ SumOf of_lane_across(int lanes) const {
    SumOf other;
    other.value = __shfl_xor_sync(kAllLanes, value, lanes);
    return other;
  }
  // The map from what was kept of it.
  __device__ __forceinline__ static A map(A kept, const Raise&) { return kept; }
  __device__ __forceinline__ static A slope(A slope, A, const Raise&) { return slope; }
};

// The feature of the largest |x| and its channel, the lowest at a tie. NaN wins and then stays.
template <class A, class Raise_>
struct LargestOf {
  using Raise = Raise_;
  static constexpr bool kHasArgmax = true;
  A value = 0;
  int channel = INT32_MAX;

  __device__ __forceinline__ void see(A x, int at, const Raise&) { merge(x, at); }
  __device__ __forceinline__ void merge(const LargestOf& other) {
    merge(other.value, other.channel);
  }
  __device__ __forceinline__ LargestOf of_lane_across(int lanes) const {
    LargestOf other;
    other.value = __shfl_xor_sync(kAllLanes, value, lanes);
    other.channel = __shfl_xor_sync(kAllLanes, channel, lanes);
    return other;
  }
  __device__ __forceinline__ static A map(A kept, const Raise& power) { return power(kept); }
  __device__ __forceinline__ static A slope(A slope, A kept, const Raise& power) {
    return slope * power.derivative(kept);
  }

 private:
  __device__ __forceinline__ void merge(A x, int at) {
    const A a = magnitude(x), b = magnitude(value);
    const bool ties = a == b || (a != a && b != b);
    if (ties ? at < channel : a > b || (a != a && b == b)) {
      value = x;
      channel = at;
    }
  }
};

}  // namespace fastkd::cuda::maps
