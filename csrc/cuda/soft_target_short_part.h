// Short rows: a warp has one, and what the kernels of one teacher and of several have in common.
//
// Each thread copies from memory to shared memory what it will compute itself, so it waits for
// nobody before the sums of the row.
#pragma once

#include "soft_target_forms.h"
#include "soft_target_stage.h"

namespace fastkd::cuda::logits {

// Classes of a thread: two exponentials of so many take 64 registers of at most 128.
constexpr int kHeld = 32;
constexpr int kMixedHeld = 24;  // where dtypes differ: what they are takes registers
constexpr int kFew = 8;         // where the row is shorter
constexpr int kShortThreads = 128;
constexpr int kShortWarps = kShortThreads / kWarp;

// Of blocks there are several on a multiprocessor: up to 168 registers a thread, or 80.
constexpr int blocks_together(int classes) { return classes > kFew ? 3 : 6; }

struct ShortShared {
  Losses totals[kShortWarps];
  LossShared<kShortWarps> losses;
  double counted;
  Weights<float> weights;
};

// A thread's part: kVectors vectors of kLength classes of a row, each of which has so many planes
// in a stage.
template <int kLength, int kVectors, int kPlanes>
struct ShortPart {
  static constexpr int N = kLength, V = kVectors;
  static constexpr int kStageBytes = kShortThreads * V * kPlanes * kAccess;  // of a block
  using Vectors = float[V * N];

  const Call& call;
  const Share& share;
  char* const stages;
  const int classes = int(call.classes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool leads = lane == 0;

  __device__ __forceinline__ uint32_t first_row() const {
    const uint32_t first = blockIdx.x * (blockDim.x / kWarp) + warp;
    return first < call.rows ? first : call.rows;
  }
  __device__ __forceinline__ uint32_t row_after(uint32_t row) const {
    return call.rows - row > share.teams ? row + share.teams : call.rows;
  }

  // One of the thread's stages.
  __device__ __forceinline__ Stage stage(int which) const {
    const int place = which * int(blockDim.x / kWarp) + warp;
    return {stages + (place * V * kPlanes * kWarp + lane) * kAccess, kWarp * kAccess};
  }

  // Whether this thread has a vector, which is the row's from class i on.
  __device__ __forceinline__ bool place_of(int v, int phase, int& i) const {
    const int vector = v * kWarp + lane;
    i = vector * N - phase;
    return vector < share.vectors;
  }
  __device__ __forceinline__ bool is_whole(int i) const { return i >= 0 && i + N <= classes; }
  // f(vector, its first class), for those that this thread has.
  template <class F>
  __device__ __forceinline__ void over_vectors(int phase, const F& f) const {
#pragma unroll
    for (int v = 0, i; v < V; ++v)
      if (place_of(v, phase, i)) f(v, i);
  }
  // Rolled: the addresses of all vectors would take registers that the exponentials need.
  template <class F>
  __device__ __forceinline__ void over_vectors_rolled(int phase, const F& f) const {
#pragma unroll 1
    for (int v = 0, i; v < V && place_of(v, phase, i); ++v) f(v, i);
  }

  // Before the first row.
  __device__ __forceinline__ void open(ShortShared& shared) const {
    const double counted = counted_rows(call, shared.losses);
    const Weights<float> weights(call, divisor_of(call, counted), 1);
    if (threadIdx.x == 0) {
      shared.counted = counted;
      shared.weights = weights;
    }
    if (leads) shared.totals[warp] = {0, 0};
    __syncthreads();
  }

  // After the last row.
  __device__ __forceinline__ void close(ShortShared& shared, const Tickets& tickets) const {
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

// Launches a kernel, if a warp has room for a row, and the chip for a block; `call` is the kernel's
// argument or a part of that.
template <class Shared, class RowPart, class C>
bool launch_short(void (*kernel)(C, Share, Tickets), const C& argument, const Call& call,
                  int stages, const Scratch& scratch, const Stream& stream) {
  const int64_t vectors = vectors_of(call, RowPart::N);
  if (vectors > kWarp * RowPart::V) return false;
  Grid grid{1, kShortThreads, kHeader<Shared> + size_t(stages) * size_t(RowPart::kStageBytes)};
  const int64_t resident = resident_clusters(kernel, grid, stream);
  if (resident == 0) return false;
  grid.blocks =
      std::min({(int64_t(call.rows) + kShortWarps - 1) / kShortWarps, resident, kMostBlocks});
  launch(kernel, grid, stream, argument,
         Share{int(vectors), int(vectors), 1, uint32_t(grid.blocks * kShortWarps)},
         scratch.tickets(call, stream));
  return true;
}

}  // namespace fastkd::cuda::logits
