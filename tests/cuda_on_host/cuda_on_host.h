// What kernels reach by functions of their own headers, because CUDA has only syntax or PTX for it;
// and what tests set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_host {

// In a kernel.

void* shared_memory();  // the block's dynamic shared memory

unsigned cluster_rank();  // the block's in its cluster
unsigned cluster_size();  // in blocks
void cluster_arrive();
void cluster_wait();
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The place of `p`, which is in this block's shared memory, in that of another block.
void* map_shared_address(const void* p, unsigned rank);
template <class T>
T* map_shared(T* p, unsigned rank) {
  return static_cast<T*>(map_shared_address(p, rank));
}

// An mbarrier in shared memory: a phase is complete when so many threads have said how many bytes
// to expect and these have arrived. A wait is for the phase with a parity.
void mbarrier_init(uint64_t* mbarrier, unsigned threads);
void mbarrier_expect(uint64_t* mbarrier, unsigned bytes);
void mbarrier_wait(const uint64_t* mbarrier, unsigned parity);

// From global to shared memory, at any time from now on.
void copy_bulk(void* to, const void* from, size_t bytes, uint64_t* mbarrier);

// A message to the place of `to` in another block's shared memory, where it arrives at any time
// from now on; that block's mbarrier, in the place of this one's, counts its bytes.
void store_async_bytes(void* to, const void* message, size_t bytes, uint64_t* mbarrier,
                       unsigned rank);
template <class Message>
void store_async(Message* to, const Message& message, uint64_t* mbarrier, unsigned rank) {
  store_async_bytes(to, &message, sizeof message, mbarrier, rank);
}

// For a counter in global memory, which other blocks raise by atomics.
void wait_until(const unsigned* counter, unsigned least);

// The chip stops a kernel at an address that is not a multiple of the access; the host would not.
void misaligned(const void* p, size_t bytes);
inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) misaligned(p, bytes);
}

// Outside of one.

// The order in which threads run follows from the seed and the number of launches since.
void set_schedule(uint64_t seed);

void set_multiprocessors(int count);

// Makes the device of this chip the current one.
void set_capability(int major, int minor);

// Bulk copies that kernels have asked for so far.
extern uint64_t bulk_copies_begun;

// Whether streams say that they are being captured into a graph. Launches run all the same.
void set_capturing(bool is_capturing);

}  // namespace cuda_on_host
