// What kernels build on: storage types, accesses of 16 bytes, shared memory. All that nvcc alone
// understands is here; without it the same sources run on the host (tests/cuda_on_host).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../tensor.h"

namespace fastkd::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// A kernel's shared memory, as one struct.
template <class T>
__device__ __forceinline__ T& shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) char shared[];
  return *reinterpret_cast<T*>(shared);
#else
  return *static_cast<T*>(cuda_on_host::shared_memory());
#endif
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class S>
__device__ __forceinline__ S narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// A product that is rounded by itself, and so the same wherever it is computed: elsewhere the
// compiler rounds a product and its sum once.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// Until other blocks have counted so far, in one thread; what they wrote before is then seen.
__device__ __forceinline__ void wait_until(const unsigned* counter, unsigned least) {
#ifdef __CUDACC__
  unsigned count;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(count)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    if (count >= least) return;
    __nanosleep(64);
  }
#else
  cuda_on_host::wait_until(counter, least);
#endif
}

// One more on a counter that others wait for, after what this thread knows to be written.
__device__ __forceinline__ void count_up(unsigned* counter) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter))
               : "memory");
#else
  __threadfence();
  atomicAdd(counter, 1);
#endif
}

// The same, and how many there were before; what they had written is then seen.
__device__ __forceinline__ unsigned count_up_and_tell(unsigned* counter) {
#ifdef __CUDACC__
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
#else
  __threadfence();
  return atomicAdd(counter, 1);
#endif
}

// The same on a counter that `last` takes back to 0.
__device__ __forceinline__ unsigned count_up_to(unsigned* counter, unsigned last) {
#ifdef __CUDACC__
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(last)
               : "memory");
  return before;
#else
  __threadfence();
  return atomicInc(counter, last);
#endif
}

constexpr int kAccess = 16;  // bytes that one lane moves at a time

// N elements that are read and written together, 16 bytes at a time.
template <class S, int N>
struct alignas(kAccess) Vector {
  static_assert(sizeof(S) * N % kAccess == 0);
  S values[N];
};

template <int N, class S>
__device__ __forceinline__ Vector<S, N> load(const S* p) {
#ifndef __CUDACC__
  cuda_on_host::check_aligned(p, kAccess);
#endif
  return *reinterpret_cast<const Vector<S, N>*>(p);
}

// What the second-level cache is told of memory that is read, and not needed again or perhaps.
__device__ __forceinline__ uint64_t eviction(bool is_once) {
#ifdef __CUDACC__
  uint64_t policy;
  if (is_once)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
#else
  return is_once;
#endif
}

// From global memory, with what the cache is told.
template <int N, class S>
__device__ __forceinline__ Vector<S, N> load(const S* p, uint64_t policy) {
#ifdef __CUDACC__
  static_assert(sizeof(Vector<S, N>) == kAccess);
  uint4 words;
  asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(p)), "l"(policy));
  Vector<S, N> v;
  memcpy(&v, &words, sizeof v);
  return v;
#else
  (void)policy;
  return load<N>(p);
#endif
}

// To global memory.
template <int N, class S>
__device__ __forceinline__ void store(const Vector<S, N>& v, S* p) {
#ifdef __CUDACC__
  // The compiler would take the access apart where other code writes these elements one by one.
  uint4 words[sizeof v / kAccess];
  memcpy(words, &v, sizeof v);
#pragma unroll
  for (size_t i = 0; i < sizeof v / kAccess; ++i)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(p) + i * kAccess), "r"(words[i].x), "r"(words[i].y),
                   "r"(words[i].z), "r"(words[i].w)
                 : "memory");
#else
  cuda_on_host::check_aligned(p, kAccess);
  *reinterpret_cast<Vector<S, N>*>(p) = v;
#endif
}

// f(null pointers of two storage types), for all but float64.
template <class F>
constexpr auto with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f16:
      return f(static_cast<__half*>(nullptr));
    case DType::bf16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace fastkd::cuda
