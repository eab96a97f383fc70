// Blocks of a cluster, which reach into each other's shared memory. Chips before 9.0 have none.
#pragma once

#include "bulk_copy.h"

namespace fastkd::cuda {

constexpr bool kHasClusters = kHasBulkCopies;

#ifndef __CUDACC__
using cuda_on_host::cluster_rank;
#else
// Asked for again each time, which takes less than a register that holds it.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
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
  __device__ void open();
  // By one thread of each block, in each round, before it sends: so many messages will come.
  __device__ void expect(unsigned count, int round);
  // To the place `at` in a block.
  __device__ void send(const Message& message, unsigned at, unsigned to, int round);
  // By any of the block's threads: the messages in their places, when all of them are there.
  __device__ const Message* receive(unsigned count, int round);
};

#ifndef __CUDACC__
template <class Message, int kMost>
void ClusterExchange<Message, kMost>::open() {
  if (threadIdx.x == 0) arrivals[0].state = arrivals[1].state = 0;
  cuda_on_host::cluster_sync();
}
template <class Message, int kMost>
void ClusterExchange<Message, kMost>::expect(unsigned, int) {}
template <class Message, int kMost>
void ClusterExchange<Message, kMost>::send(const Message& message, unsigned at, unsigned to,
                                           int round) {
  *cuda_on_host::map_shared(&messages[round % 2][at], to) = message;
  auto* const arrival = reinterpret_cast<unsigned*>(&arrivals[round % 2]);
  cuda_on_host::raise(cuda_on_host::map_shared(arrival, to));
}
template <class Message, int kMost>
const Message* ClusterExchange<Message, kMost>::receive(unsigned count, int round) {
  cuda_on_host::wait_for(reinterpret_cast<unsigned*>(&arrivals[round % 2]),
                         count * unsigned(round / 2 + 1));
  return messages[round % 2];
}
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned shared_address(const void* p, unsigned rank) {
  unsigned mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(mapped)
               : "r"(shared_address(p)), "r"(rank));
  return mapped;
}

template <class Message, int kMost>
__device__ __forceinline__ void ClusterExchange<Message, kMost>::open() {
  if (threadIdx.x == 0)
    for (Mbarrier& one : arrivals) one.init();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <class Message, int kMost>
__device__ __forceinline__ void ClusterExchange<Message, kMost>::expect(unsigned count, int round) {
  arrivals[round % 2].expect(unsigned(sizeof(Message)) * count);
}

template <class Message, int kMost>
__device__ __forceinline__ void ClusterExchange<Message, kMost>::send(const Message& message,
                                                                      unsigned at, unsigned to,
                                                                      int round) {
  static_assert(sizeof(Message) % sizeof(uint4) == 0 && alignof(Message) >= sizeof(uint4));
  uint4 words[sizeof(Message) / sizeof(uint4)];
  memcpy(words, &message, sizeof message);
  const unsigned place = shared_address(&messages[round % 2][at], to);
  const unsigned arrival = shared_address(&arrivals[round % 2], to);
#pragma unroll
  for (unsigned i = 0; i < sizeof(Message) / sizeof(uint4); ++i)
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(place + i * unsigned(sizeof(uint4))),
        "r"(words[i].x), "r"(words[i].y), "r"(words[i].z), "r"(words[i].w), "r"(arrival)
        : "memory");
}

template <class Message, int kMost>
__device__ __forceinline__ const Message* ClusterExchange<Message, kMost>::receive(unsigned,
                                                                                   int round) {
  arrivals[round % 2].wait(unsigned(round / 2 % 2));
  return messages[round % 2];
}
#else
template <class Message, int kMost>
__device__ void ClusterExchange<Message, kMost>::open() {}
template <class Message, int kMost>
__device__ void ClusterExchange<Message, kMost>::expect(unsigned, int) {}
template <class Message, int kMost>
__device__ void ClusterExchange<Message, kMost>::send(const Message&, unsigned, unsigned, int) {}
template <class Message, int kMost>
__device__ const Message* ClusterExchange<Message, kMost>::receive(unsigned, int) {
  return messages[0];
}
#endif

}  // namespace fastkd::cuda
