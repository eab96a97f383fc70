// Rows that stay on the chip: who holds what of a row, and what the kernels of one teacher and of
// several have in common.
//
// A team has a row: a warp, a block or a cluster of blocks. Each thread copies from memory to
// shared memory what it will compute itself, so it waits for nobody before the sums of the row.
#pragma once

#include "cluster.h"
#include "soft_target_forms.h"
#include "soft_target_stage.h"

namespace fastkd::cuda::logits {

// The thresholds between the forms. A thread holds two exponentials of so many classes, 64
// registers of at most 128: a multiprocessor then has 512 threads, and 16,384 classes, at a time.
constexpr int kHeld = 32;
constexpr int kMixedHeld = 24;  // where dtypes differ: what they are takes registers
constexpr int kFew = 8;         // where a warp is a row's, and the row is short
constexpr int kWarpRowThreads = 128;
// As long as a cluster of such blocks holds the row: two of them are on a multiprocessor, and one
// computes as the other waits.
constexpr int kBlockThreads = 256;
constexpr Blocks kClusters[] = {{kBlockThreads, 2},  {kBlockThreads, 4}, {kBlockThreads, 8},
                                {kBlockThreads, 16}, {kMostThreads, 8},  {kMostThreads, 16}};

enum class Scope { warp, block, cluster };  // who has a row

// The bounds of a kernel whose threads hold so many classes. Of blocks of kWarpRowThreads there are
// several on a multiprocessor: up to 168 registers a thread, or 80.
constexpr int most_threads(Scope scope) {
  return scope == Scope::warp ? kWarpRowThreads : kMostThreads;
}
constexpr int blocks_together(Scope scope, int classes) {
  return scope != Scope::warp ? 1 : classes > kFew ? 3 : 6;
}

struct TeamShared {
  ClusterExchange<RowState<float>, kMostCluster> of_blocks;
  Losses totals[kMostWarps];
  LossShared<kMostWarps> losses;
  double counted;
  Weights<float> weights;
};

// A thread's place in its team. V vectors of N classes of a row are a thread's, and each takes so
// many planes of a stage.
template <Scope kScope, int V, int N, int kPlanes>
struct Team {
  static constexpr bool kIsWarp = kScope == Scope::warp, kIsCluster = kScope == Scope::cluster;
  using Vectors = float[V * N];

  const Call& call;
  const Share& share;
  char* const stages;
  const int classes = int(call.classes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int threads = kIsWarp ? kWarp : int(blockDim.x);
  const int thread = kIsWarp ? lane : int(threadIdx.x);
  const bool leads = thread == 0 && rank() == 0;

  __device__ __forceinline__ static int rank() { return kIsCluster ? int(cluster_rank()) : 0; }

  __device__ __forceinline__ uint32_t first_row() const {
    const uint32_t first =
        kIsWarp ? blockIdx.x * (blockDim.x / kWarp) + warp : blockIdx.x / unsigned(share.blocks);
    return first < call.rows ? first : call.rows;
  }
  __device__ __forceinline__ uint32_t row_after(uint32_t row) const {
    return call.rows - row > share.teams ? row + share.teams : call.rows;
  }

  // One of the thread's stages.
  __device__ __forceinline__ Stage stage(int which) const {
    const int place = kIsWarp ? which * int(blockDim.x / kWarp) + warp : which;
    return {stages + (place * V * kPlanes * threads + thread) * kAccess, threads * kAccess};
  }

  // The block's vectors; a cluster's last blocks may have fewer.
  __device__ __forceinline__ int vectors_here() const {
    return kIsCluster ? min(share.vectors, share.all - rank() * share.vectors) : share.vectors;
  }
  // Whether this thread has a vector, which is the row's from class i on.
  __device__ __forceinline__ bool place_of(int v, int phase, int& i) const {
    const int in_block = v * threads + thread;
    i = (rank() * share.vectors + in_block) * N - phase;
    return in_block < vectors_here();
  }
  __device__ __forceinline__ bool is_whole(int i) const { return i >= 0 && i + N <= classes; }
  // f(vector, its first class), for those that this thread has.
  template <class F>
  __device__ __forceinline__ void over_vectors(int phase, const F& f) const {
    const int before = rank() * share.vectors, here = vectors_here();
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int in_block = v * threads + thread;
      if (in_block < here) f(v, (before + in_block) * N - phase);
    }
  }
  // Rolled: the addresses of all vectors would take registers that the exponentials need.
  template <class F>
  __device__ __forceinline__ void over_vectors_rolled(int phase, const F& f) const {
#pragma unroll 1
    for (int v = 0, i; v < V && place_of(v, phase, i); ++v) f(v, i);
  }

  // Before the first row.
  __device__ __forceinline__ void open(TeamShared& shared) const {
    const double counted = counted_rows(call, shared.losses);
    const Weights<float> weights(call, divisor_of(call, counted), 1);
    if (threadIdx.x == 0) {
      shared.counted = counted;
      shared.weights = weights;
    }
    if (leads) shared.totals[warp] = {0, 0};
    __syncthreads();
    if constexpr (kIsCluster) shared.of_blocks.open();
  }

  // After the last row.
  __device__ __forceinline__ void close(TeamShared& shared, const Tickets& tickets) const {
    write_loss<float>(call, leads ? shared.totals[warp] : Losses{}, shared.counted, tickets,
                      shared.losses);
  }

  // The first row from `row` on that counts. Those before it are done with here; start_of_row(row)
  // is where a row begins.
  template <class S, class F>
  __device__ __forceinline__ uint32_t find(uint32_t row, const F& start_of_row) const {
    while (row < call.rows && ignores(call, row)) {
      if (leads) write_ignored_row<float>(call, row);
      if (call.sides[kToStudent].data != nullptr) {
        const Start<> start = start_of_row(row);
        const float zeros[N] = {};
        over_vectors_rolled(
            start.phase, [&](int, int i) { store_vector<S>(zeros, call, kToStudent, start, i); });
      }
      row = row_after(row);
    }
    return row;
  }

  // The sum of a row's logits in this lane, scaled, for label smoothing.
  __device__ __forceinline__ double sum_of(const Vectors& s, int phase) const {
    double logits = 0;
    over_vectors(phase, [&](int v, int i) {
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k >= 0 && i + k < classes) logits += double(s[v * N + k]);
    });
    return logits * kLogitScale;
  }

  // The exponentials at temperature 1, which wait in a stage; returns their sum.
  __device__ __forceinline__ float exp_hard(const Vectors& s, float s_shift,
                                            const Rates<float>& rates, const Stage& stage) const {
    float sum = 0;
    over_vectors(0, [&](int v, int) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float eh = rates.exp_hard(shifted(s[v * N + k], s_shift));
        sum += eh;
        stage.plane(v * kPlanes).template put<float>(k, eh);
      }
    });
    return sum;
  }

  // The team's state from each warp's: in every thread, or in the first warp alone. `step` counts
  // such calls.
  template <bool kInAll, class Merge>
  __device__ __forceinline__ void merge(RowState<float>& row, RowState<float>* of_warps,
                                        TeamShared& shared, int step, const Merge& merge) const {
    if constexpr (!kIsWarp) {
      if (lane == 0) of_warps[warp] = row;
      __syncthreads();
      if ((kInAll && !kIsCluster) || warp == 0) {
        const int other = lane % kMostWarps;
        row = other < int(blockDim.x / kWarp) ? of_warps[other] : RowState<float>();
        merge.template over<kMostWarps>(row);
      }
    }
    if constexpr (kIsCluster) {
      if (warp == 0) {
        if (lane == 0) shared.of_blocks.expect(unsigned(share.blocks), step);
        if (lane < share.blocks) shared.of_blocks.send(row, cluster_rank(), unsigned(lane), step);
      }
      if (kInAll || warp == 0) {
        const RowState<float>* const received =
            shared.of_blocks.receive(unsigned(share.blocks), step);
        const int other = lane % kMostCluster;
        row = other < share.blocks ? received[other] : RowState<float>();
        merge.template over<kMostCluster>(row);
      }
    }
  }

  // Writes the gradient of the thread's vectors, of what was kept of their classes.
  template <class D, class S>
  __device__ __forceinline__ void write_gradient(const Start<>& start, const Vectors& es,
                                                 const Vectors& kept, const Stage& of_hard,
                                                 const RowFactors<float>& by, int label) const {
    over_vectors(start.phase, [&](int v, int i) {
      float g[N] = {};
      if (by.has_hard) of_hard.plane(v * kPlanes).template load_to<float, N>(DType::f32, g);
#pragma unroll
      for (int k = 0; k < N; ++k)
        g[k] = by.template gradient<D>(es[v * N + k], kept[v * N + k], g[k]);
      if (label >= 0 && label >= i && label < i + N) {
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (i + k == label) g[k] -= by.label;
      }
      if (!by.any) {
#pragma unroll
        for (int k = 0; k < N; ++k) g[k] = 0;
      }
      store_vector<S>(g, call, kToStudent, start, i);
    });
  }
};

// Launches a kernel, if the chip has room for it; `call` is its argument or a part of that.
template <class Shared, Scope kScope, int V, int N, int kPlanes, class C>
bool launch_team(void (*kernel)(C, Share, Tickets), const C& argument, const Call& call,
                 int threads, int cluster, const Scratch& scratch, const Stream& stream) {
  const int64_t vectors = vectors_of(call, N);
  const int64_t of_block = (vectors + cluster - 1) / cluster;
  if (of_block > int64_t(kScope == Scope::warp ? kWarp : threads) * V) return false;
  if (kScope != Scope::warp) threads = int((of_block + V * kWarp - 1) / (V * kWarp)) * kWarp;
  const size_t stage = size_t(threads) * V * kPlanes * kAccess;
  Grid grid{1, threads, kHeader<Shared> + (call.has_hard() ? 2 : 1) * stage, cluster};
  const int64_t resident = resident_clusters(kernel, grid, stream);
  if (resident == 0) return false;
  const int64_t teams = kScope == Scope::warp ? threads / kWarp : 1;
  grid.blocks =
      std::min({(int64_t(call.rows) + teams - 1) / teams, resident, kMostBlocks / cluster}) *
      cluster;
  launch(kernel, grid, stream, argument,
         Share{int(vectors), int(of_block), cluster, uint32_t(grid.blocks / cluster * teams)},
         scratch.tickets(call, stream));
  return true;
}

// The smallest team that has room for a row: of attempt(scope, vectors of a thread, threads of a
// block, blocks of a cluster), the first two as types.
template <int kFewest, int kMost, int kOfBlock, class F>
bool launch_smallest(const F& attempt) {
  const std::integral_constant<Scope, Scope::warp> warp;
  const std::integral_constant<Scope, Scope::block> block;
  const std::integral_constant<Scope, Scope::cluster> cluster;
  const std::integral_constant<int, kFewest> fewest;
  const std::integral_constant<int, kMost> most;
  const std::integral_constant<int, kOfBlock> of_block;
  if (attempt(warp, fewest, kWarpRowThreads, 1) || attempt(warp, most, kWarpRowThreads, 1) ||
      attempt(block, of_block, kBlockThreads, 1))
    return true;
  for (const auto& [threads, blocks] : kClusters)
    if (attempt(cluster, most, threads, blocks)) return true;
  return attempt(block, of_block, kMostThreads, 1);
}

}  // namespace fastkd::cuda::logits
