// What a kernel may call: barriers, warp primitives, atomics, loads and stores with a hint,
// numbers.
#pragma once

#include "cuda_on_host.h"
#include "device_types.h"

namespace cuda_on_host {

enum class Primitive {
  none,
  syncthreads,
  syncthreads_count,
  syncwarp,
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  ballot,
  any,
  all,
  cluster_wait,
  wait_for,
  mbarrier_wait,
};

// Waits for the block; the number of its threads that came with `predicate`.
int meet_block(Primitive at, bool predicate);

// Waits for the lanes of `mask`; the lanes among them that came with `predicate`.
unsigned meet_warp(Primitive at, unsigned mask, bool predicate);

// Waits for the lanes of `mask`; what the lane `source` came with.
uint64_t shuffle(Primitive at, unsigned mask, uint64_t value, int source);

// The source lane of this thread's shuffle.
int shuffle_source(Primitive at, int argument, int width);

// A moment at which the chip might run other threads.
void maybe_switch();
void let_waiting_go_on();  // after an atomic

template <class T>
T shuffle(Primitive at, unsigned mask, T value, int argument, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(at, mask, bits, shuffle_source(at, argument, width));
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
using same = std::common_type_t<T>;  // lets an argument convert to what another one says

template <class T, class F>
T atomically(T* p, F&& change) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                std::is_same_v<T, unsigned long long>);
  maybe_switch();
  check_aligned(p, sizeof(T));
  const T before = *p;
  *p = change(before);
  let_waiting_go_on();
  maybe_switch();
  return before;
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::meet_block(cuda_on_host::Primitive::syncthreads, false);
}
inline int __syncthreads_count(int predicate) {
  return cuda_on_host::meet_block(cuda_on_host::Primitive::syncthreads_count, predicate);
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffff) {
  cuda_on_host::meet_warp(cuda_on_host::Primitive::syncwarp, mask, false);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_host::meet_warp(cuda_on_host::Primitive::ballot, mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate) {
  return cuda_on_host::meet_warp(cuda_on_host::Primitive::any, mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return cuda_on_host::meet_warp(cuda_on_host::Primitive::all, mask, !predicate) == 0;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return cuda_on_host::shuffle(cuda_on_host::Primitive::shfl, mask, value, source, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_on_host::shuffle(cuda_on_host::Primitive::shfl_up, mask, value, int(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_on_host::shuffle(cuda_on_host::Primitive::shfl_down, mask, value, int(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  return cuda_on_host::shuffle(cuda_on_host::Primitive::shfl_xor, mask, value, lanes, width);
}

// Of all lanes of the mask, which must be those of a warp.
inline int __reduce_max_sync(unsigned mask, int value) {
  for (int lanes = warpSize / 2; lanes > 0; lanes /= 2) {
    const int other = __shfl_xor_sync(mask, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

inline void __threadfence() { cuda_on_host::maybe_switch(); }
inline void __threadfence_block() { cuda_on_host::maybe_switch(); }
inline void __threadfence_system() { cuda_on_host::maybe_switch(); }

template <class T>
T atomicAdd(T* p, cuda_on_host::same<T> x) {
  return cuda_on_host::atomically(p, [=](T old) { return T(old + x); });
}
template <class T>
T atomicMax(T* p, cuda_on_host::same<T> x) {
  return cuda_on_host::atomically(p, [=](T old) { return old < x ? x : old; });
}
template <class T>
T atomicMin(T* p, cuda_on_host::same<T> x) {
  return cuda_on_host::atomically(p, [=](T old) { return x < old ? x : old; });
}
template <class T>
T atomicExch(T* p, cuda_on_host::same<T> x) {
  return cuda_on_host::atomically(p, [=](T) { return x; });
}
template <class T>
T atomicCAS(T* p, cuda_on_host::same<T> expected, cuda_on_host::same<T> x) {
  return cuda_on_host::atomically(p, [=](T old) { return old == expected ? x : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return cuda_on_host::atomically(p, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

template <class T>
T __ldg(const T* p) {
  cuda_on_host::check_aligned(p, alignof(T));
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return __ldg(p);
}
template <class T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <class T>
void __stcs(T* p, cuda_on_host::same<T> x) {
  cuda_on_host::check_aligned(p, alignof(T));
  *p = x;
}
template <class T>
void __stcg(T* p, cuda_on_host::same<T> x) {
  __stcs(p, x);
}
template <class T>
void __stwt(T* p, cuda_on_host::same<T> x) {
  __stcs(p, x);
}

inline int __float_as_int(float x) { return cuda_on_host::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_host::same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_host::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_host::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_host::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_host::same_bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// As CUDA has them: NaN loses to a number, and mixed integers are compared as unsigned.
template <class A, class B>
auto min(A a, B b) -> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                                       std::common_type_t<A, B>> {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
auto max(A a, B b) -> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>,
                                       std::common_type_t<A, B>> {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }

// Not to be contracted with a sum; every other product may be, as by nvcc.
template <class T>
inline T rounded(T product) {
  asm("" : "+x"(product));
  return product;
}
inline float __fmul_rn(float x, float y) { return rounded(x * y); }
inline double __dmul_rn(double x, double y) { return rounded(x * y); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
