// A thread's part in long rows: which classes it has, and where they are in shared memory.
#pragma once

#include "soft_target_long_rows.h"

namespace fastkd::cuda::logits {

// kVectors vectors of kLength classes of a row, and of every row, are a thread's. Each has so many
// planes in the thread's stage.
template <bool kIsCluster, int kLength, int kVectors, int kPlanes>
struct LongPart {
  static constexpr int N = kLength, V = kVectors;

  const Call& call;
  const Share& share;
  char* const stages;
  const int threads = blockDim.x, thread = threadIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;

  __device__ __forceinline__ static int rank() { return kIsCluster ? int(cluster_rank()) : 0; }
  // Whether every row is whole vectors, each of which lies where an access of 16 bytes may.
  __device__ __forceinline__ bool is_even() const {
    return call.is_aligned && int(call.classes) % N == 0;
  }
  __device__ __forceinline__ bool has_gradient() const {
    return call.sides[kToStudent].data != nullptr;
  }

  // Of the block's vectors the first one, and how many there are: a cluster's last blocks may have
  // fewer.
  __device__ __forceinline__ int first_vector() const { return rank() * share.vectors; }
  __device__ __forceinline__ int vectors_here() const {
    return kIsCluster ? min(share.vectors, share.all - first_vector()) : share.vectors;
  }
  __device__ __forceinline__ bool has(int v) const { return v * threads + thread < vectors_here(); }
  // f(vector, its first class), for those that this thread has.
  template <class F>
  __device__ __forceinline__ void over_vectors(int phase, const F& f) const {
    const int first = (first_vector() + thread) * N - phase;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (has(v)) f(v, first + v * threads * N);
  }
  // Rolled, for what is rare.
  template <class F>
  __device__ __forceinline__ void over_vectors_rolled(int phase, const F& f) const {
    const int first = (first_vector() + thread) * N - phase;
#pragma unroll 1
    for (int v = 0; has(v); ++v) f(v, first + v * threads * N);
  }

  // What a thread copies for itself, vector by vector; and its exponentials at temperature 1.
  __device__ __forceinline__ Stage stage(int v) const {
    return {stages + (v * kPlanes * threads + thread) * kAccess, threads * kAccess};
  }
  __device__ __forceinline__ Stage of_hard(int v) const {
    constexpr int kHard = planes_of<float>(N);
    return {stages + ((V * kPlanes + v * kHard) * threads + thread) * kAccess, threads * kAccess};
  }
  static constexpr int planes(const Call& call) {
    return V * (kPlanes + (call.has_hard ? planes_of<float>(N) : 0));
  }

  // The warp's sum of a row's logits, which are in the first planes of its threads' stages, scaled.
  template <class S>
  __device__ __forceinline__ double sum_of_logits(DType dtype, int phase) const {
    double sum = 0;
    over_vectors_rolled(phase, [&](int v, int i) {
      float x[N];
      stage(v).template load_to<S, N>(dtype, x);
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k >= 0 && i + k < int(call.classes)) sum += double(x[k]);
    });
    return warp_sum(sum * kLogitScale);
  }
  // Sends a warp's state to all blocks of the row; `step` counts such calls.
  __device__ __forceinline__ void send(LongShared& shared, const RowState<float>& own,
                                       int step) const {
    if constexpr (kIsCluster) {
      if (thread == 0) shared.parts.expect(unsigned(warps * share.blocks), step);
      if (lane < share.blocks)
        shared.parts.send(own, unsigned(rank() * warps + warp), unsigned(lane), step);
    } else {
      if (lane == 0) shared.parts.messages[0][warp] = own;
      __syncthreads();
    }
  }
  // The states of all warps, when they are there.
  __device__ __forceinline__ static const RowState<float>* receive(LongShared& shared, int step) {
    return kIsCluster ? shared.parts.receive(step) : shared.parts.messages[0];
  }
  // A row that does not count has no loss and no gradient.
  template <class S>
  __device__ __forceinline__ void write_ignored(uint32_t row, const Start<>& start) const {
    if (thread == 0 && rank() == 0) write_ignored_row<float>(call, row);
    if (!has_gradient()) return;
    const float zeros[N] = {};
    over_vectors_rolled(start.phase,
                        [&](int, int i) { store_vector<S>(zeros, call, kToStudent, start, i); });
  }
};

// Launches a kernel of such parts with these blocks, if the chip has room for it; `call` is its
// argument or a part of that.
template <class RowPart, class Shared, class C>
bool launch_long(void (*kernel)(C, Share, Tickets), const C& argument, const Call& call,
                 const Blocks& blocks, const Scratch& scratch, const Stream& stream) {
  const int64_t vectors = vectors_of(call, RowPart::N);
  const int64_t of_block = (vectors + blocks.cluster - 1) / blocks.cluster;
  if (of_block > int64_t(blocks.threads) * RowPart::V) return false;
  const int threads = int((of_block + RowPart::V * kWarp - 1) / (RowPart::V * kWarp)) * kWarp;
  Grid grid{1, threads, kHeader<Shared> + size_t(threads) * size_t(RowPart::planes(call) * kAccess),
            blocks.cluster};
  const int64_t resident = resident_clusters(kernel, grid, stream);
  if (resident == 0) return false;
  const int64_t teams = std::min({int64_t(call.rows), resident, kMostBlocks / blocks.cluster});
  grid.blocks = teams * blocks.cluster;
  launch(kernel, grid, stream, argument,
         Share{int(vectors), int(of_block), blocks.cluster, uint32_t(teams)},
         scratch.tickets(call, stream));
  return true;
}

}  // namespace fastkd::cuda::logits
