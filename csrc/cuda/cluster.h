// Blocks of a cluster, which reach into each other's shared memory. Chips before 9.0 have none.
#pragma once

#include "bulk_copy.h"

namespace fastkd::cuda {

constexpr bool kHasClusters = kHasBulkCopies;

#ifndef __CUDACC__
using cuda_on_host::cluster_rank;
using cuda_on_host::cluster_sync;
using cuda_on_host::store_async;
#else
// Asked for again each time, which takes less than a register that holds it.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ unsigned shared_address(const void* p, unsigned rank) {
  unsigned mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(mapped)
               : "r"(shared_address(p)), "r"(rank));
  return mapped;
}

// A message to what is at `to` in the shared memory of another block, whose mbarrier counts it.
template <class Message>
__device__ __forceinline__ void store_async(Message* to, const Message& message, uint64_t* mbarrier,
                                            unsigned rank) {
  static_assert(sizeof(Message) % sizeof(uint4) == 0 && alignof(Message) >= sizeof(uint4));
  uint4 words[sizeof(Message) / sizeof(uint4)];
  memcpy(words, &message, sizeof message);
  const unsigned place = shared_address(to, rank), arrival = shared_address(mbarrier, rank);
#pragma unroll
  for (unsigned i = 0; i < sizeof(Message) / sizeof(uint4); ++i)
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(place + i * unsigned(sizeof(uint4))),
        "r"(words[i].x), "r"(words[i].y), "r"(words[i].z), "r"(words[i].w), "r"(arrival)
        : "memory");
}
#else
__device__ __forceinline__ void cluster_sync() {}
template <class Message>
__device__ __forceinline__ void store_async(Message*, const Message&, uint64_t*, unsigned) {}
#endif
#endif

// Where each block of a cluster receives the messages of all blocks in each round. Whoever sends in
// a round has received those of the round before; so two rounds' messages have a place.
//
// A message's arrival is counted by the block that receives it: unlike a barrier of the cluster
// this waits for nothing else that is under way, neither gradients that are being written nor the
// next row.
template <class Message, int kMost>
struct ClusterExchange {
  Message messages[2][kMost];
  Mbarrier arrivals[2];

  // By every thread of every block, before anything else.
  __device__ __forceinline__ void open() {
    if (threadIdx.x == 0)
      for (Mbarrier& one : arrivals) one.init();
    cluster_sync();
  }
  // By one thread of each block, in each round, before it sends: so many messages will come.
  __device__ __forceinline__ void expect(unsigned count, int round) {
    arrivals[round % 2].expect(unsigned(sizeof(Message)) * count);
  }
  // To the place `at` in a block.
  __device__ __forceinline__ void send(const Message& message, unsigned at, unsigned to,
                                       int round) {
    store_async(&messages[round % 2][at], message, &arrivals[round % 2].state, to);
  }
  // By any of the block's threads: the messages in their places, when all of them are there.
  __device__ __forceinline__ const Message* receive(int round) {
    arrivals[round % 2].wait(unsigned(round / 2 % 2));
    return messages[round % 2];
  }
};

}  // namespace fastkd::cuda
