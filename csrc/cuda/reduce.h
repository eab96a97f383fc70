// Sums over a warp, a block and a grid, in an order that does not change from run to run.
#pragma once

#include "tickets.h"

namespace fastkd::cuda {

// The sum over the warp, in every lane.
__device__ __forceinline__ double warp_sum(double x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// The sums over the block of what lane 0 of each warp has, in every thread. The block has up to
// kWarps warps. `warps` is in use until the next barrier.
template <int N, int kWarps>
__device__ __forceinline__ void sums_of_warps(double (&x)[N], double (&warps)[kWarps][N]) {
  static_assert(kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0);
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) warps[threadIdx.x / kWarp][i] = x[i];
  __syncthreads();
  const unsigned warp = threadIdx.x % kWarps;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = warp < blockDim.x / kWarp ? warps[warp][i] : 0;
#pragma unroll
    for (int lanes = kWarps / 2; lanes > 0; lanes /= 2)
      x[i] += __shfl_xor_sync(kAllLanes, x[i], lanes);
  }
}

// The same of what every thread has.
template <int N, int kWarps>
__device__ __forceinline__ void block_sums(double (&x)[N], double (&warps)[kWarps][N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
  sums_of_warps(x, warps);
}

static __device__ unsigned counters[kGridCounters.all()];

// Whether this is the last block of the grid to come here, in every thread of the block; it sees
// what thread 0 of each block wrote before. `answer` lies in shared memory.
__device__ __forceinline__ bool is_last_block(const Tickets& tickets, bool& answer) {
  if (threadIdx.x == 0) answer = count_up_to(tickets.in(counters), gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  return answer;
}

template <int N, int kWarps>
struct SharedSums {
  double warps[kWarps][N];
  bool is_last;
};

// Whether this is the grid's last block, in which the sums of what lane 0 of each warp has are then
// the grid's, in every thread. `partial` has N elements for each block.
template <int N, int kWarps>
__device__ __forceinline__ bool grid_sums_of_warps(double (&x)[N], double* partial,
                                                   const Tickets& tickets,
                                                   SharedSums<N, kWarps>& shared) {
  sums_of_warps(x, shared.warps);
  if (threadIdx.x == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) partial[int64_t(blockIdx.x) * N + i] = x[i];
  if (!is_last_block(tickets, shared.is_last)) return false;
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x)
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += partial[int64_t(block) * N + i];
  block_sums(x, shared.warps);
  return true;
}

// The same of what every thread has.
template <int N, int kWarps>
__device__ __forceinline__ bool grid_sums(double (&x)[N], double* partial, const Tickets& tickets,
                                          SharedSums<N, kWarps>& shared) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = warp_sum(x[i]);
  return grid_sums_of_warps(x, partial, tickets, shared);
}

}  // namespace fastkd::cuda
