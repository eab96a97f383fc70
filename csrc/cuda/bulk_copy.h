// Bulk copies into shared memory, which one thread asks for, and the mbarriers that count bytes as
// they arrive there. Chips before 9.0 have neither.
#pragma once

#include "device.h"

namespace fastkd::cuda {

constexpr int kFirstWithBulkCopies = 90;  // compute capability

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasBulkCopies = false;
#else
constexpr bool kHasBulkCopies = true;
#endif

// In a block's shared memory. A phase is complete when one thread has said how many bytes to expect
// and they have arrived; the next phase begins then.
struct Mbarrier {
  uint64_t state;

  // By one thread; the others may wait after a barrier of theirs.
  __device__ void init();
  // By one thread, once in each phase.
  __device__ void expect(unsigned bytes);
  // Until the phase with this parity is complete; what has arrived is then seen.
  __device__ void wait(unsigned parity);
};

#ifndef __CUDACC__
inline void Mbarrier::init() { cuda_on_host::mbarrier_init(&state, 1); }
inline void Mbarrier::expect(unsigned bytes) { cuda_on_host::mbarrier_expect(&state, bytes); }
inline void Mbarrier::wait(unsigned parity) { cuda_on_host::mbarrier_wait(&state, parity); }

inline void copy_bulk(void* to, const void* from, unsigned bytes, Mbarrier& arrival, uint64_t) {
  cuda_on_host::copy_bulk(to, from, bytes, &arrival.state);
}
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void Mbarrier::init() {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
  // Other blocks see it from now on, and so do copies, which reach memory by another way.
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void Mbarrier::expect(unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void Mbarrier::wait(unsigned parity) {
  unsigned is_complete;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(is_complete)
        : "r"(shared_address(&state)), "r"(parity)
        : "memory");
  } while (!is_complete);
}

// From global to shared memory, both aligned to 16 bytes, of a multiple of 16 bytes that `arrival`
// counts. `policy` is what the second-level cache is told.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, unsigned bytes,
                                          Mbarrier& arrival, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], "
      "%2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&arrival.state)),
      "l"(policy)
      : "memory");
}
#else
__device__ __forceinline__ void Mbarrier::init() {}
__device__ __forceinline__ void Mbarrier::expect(unsigned) {}
__device__ __forceinline__ void Mbarrier::wait(unsigned) {}
__device__ __forceinline__ void copy_bulk(void*, const void*, unsigned, Mbarrier&, uint64_t) {}
#endif

}  // namespace fastkd::cuda
