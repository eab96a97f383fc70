// Sums over a warp, a block and a grid, in an order that does not change from run to run.
#pragma once

#include <mutex>
#include <unordered_map>

#include "device.h"
#include "launch.h"

namespace fastkd::cuda {

// The sum over the warp, in every lane.
__device__ __forceinline__ double warp_sum(double x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// The sum over the block, in every thread. `warps` has one element for each warp of the block, and
// is free again when the last thread has returned and the next barrier is passed.
__device__ __forceinline__ double block_sum(double x, double* warps) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
#pragma unroll 1
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += warps[warp];
  return sum;
}

// The same of several numbers at a time; `warps` may be in use until now.
template <int N>
__device__ __forceinline__ void block_sums(double (&x)[N], double (*warps)[N]) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = warp_sum(x[i]);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp][i] = x[i];
    x[i] = 0;
  }
  __syncthreads();
#pragma unroll 1
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp)
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += warps[warp][i];
}

// Ticket counters, by which a grid finds its last block. Kernels of one stream follow one another,
// so they share a counter, which the last block resets for the next kernel.
constexpr int kCounters = 1024;
static __device__ unsigned counters[kCounters];

// Where a launch counts: a stream's counters, or memory of its own where slot is negative.
struct Tickets {
  int slot;
  unsigned* own;
};

// A captured graph may be replayed beside anything, so its launches count in memory of their own,
// which is set to 0 each time. cudaStreamPerThread is one handle for many streams. `count` counters
// are needed, and there are `most` for each of `streams`.
inline Tickets tickets(const Stream& stream, unsigned* own, size_t count = 1, size_t most = 1,
                       int streams = kCounters) {
  static std::mutex mutex;
  static std::unordered_map<cudaStream_t, int> slots;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream.handle, &capture), "asking for a capture");
  if (capture == cudaStreamCaptureStatusNone && stream.handle != cudaStreamPerThread &&
      count <= most) {
    const std::lock_guard<std::mutex> lock(mutex);
    const int slot = slots.try_emplace(stream.handle, int(slots.size())).first->second;
    if (slot < streams) return {slot, nullptr};
  }
  check(cudaMemsetAsync(own, 0, count * sizeof(unsigned), stream.handle), "clearing counters");
  return {-1, own};
}

// Whether this is the last block of the grid to come here, in every thread of the block; it sees
// what thread 0 of each block wrote before. `answer` lies in shared memory.
__device__ __forceinline__ bool is_last_block(const Tickets& tickets, bool& answer) {
  if (threadIdx.x == 0) {
    __threadfence();
    unsigned* counter = tickets.slot < 0 ? tickets.own : counters + tickets.slot;
    answer = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return answer;
}

}  // namespace fastkd::cuda
