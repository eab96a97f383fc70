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

// Counters in shared memory, as the chip counts bytes that one block writes into another: any block
// of the cluster raises one, and only what waits for that many goes on then.
void raise(unsigned* counter);
void wait_for(unsigned* counter, unsigned least);

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

// Whether streams say that they are being captured into a graph. Launches run all the same.
void set_capturing(bool is_capturing);

}  // namespace cuda_on_host
