// Rows of any length and strides, a block each: one pass over the logits for the sums, relative to
// maxima that rise on the way, and a second one for the gradient. What there is room for stays in
// shared memory between the two.
#include "soft_target_forms.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kTogether = 3;  // blocks on a multiprocessor

// A thread's part in a row of so many vectors, of which it keeps its first `kept` in shared memory,
// as A.
template <class D, class A, class S, class T>
struct Streamed {
  static constexpr int N = kClasses<A, S, T>;

  const Call& call;
  BlockShared<A>& shared;
  const int64_t vectors;
  const int kept;
  const Rates<A> rates;
  const Weights<A> weights;
  const bool with_logits;
  A* const own_place = after<A>(shared) + threadIdx.x;

  __device__ __forceinline__ A& place(int v, int k) const {
    return own_place[(v * 2 * N + k) * int(blockDim.x)];
  }
  __device__ __forceinline__ void load(const Start<>& start, int64_t i, A (&s)[N],
                                       A (&t)[N]) const {
    load_vector<A, S>(call.sides[kStudent], start.at[kStudent], i, call.classes, start.is_aligned,
                      s);
    load_vector<A, T>(call.sides[kTeacher], start.at[kTeacher], i, call.classes, start.is_aligned,
                      t);
  }

  __device__ __forceinline__ RowState<A> sums(const Start<>& start) const {
    RowState<A> own;
    int v = 0;
    for (int64_t at = threadIdx.x; at < vectors; at += int(blockDim.x), ++v) {
      A s[N], t[N];
      const int64_t i = at * N - start.phase;
      load(start, i, s, t);
      if (v < kept) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          place(v, k) = s[k];
          place(v, N + k) = t[k];
        }
      }
      add<D>(own, s, t, -i, call.classes - i, rates, with_logits);
    }
    return own;
  }
  __device__ __forceinline__ void emit(const Start<>& start, const RowState<A>& row,
                                       const RowFactors<A>& by, int64_t label) const {
    const A s_shift = shift(row.student_max), t_shift = shift(row.teacher_max);
    int v = 0;
    for (int64_t at = threadIdx.x; at < vectors; at += int(blockDim.x), ++v) {
      A g[N] = {};
      const int64_t i = at * N - start.phase;
      if (by.any) {
        A s[N], t[N];
        if (v < kept) {
#pragma unroll
          for (int k = 0; k < N; ++k) {
            s[k] = place(v, k);
            t[k] = place(v, N + k);
          }
        } else {
          load(start, i, s, t);
        }
#pragma unroll
        for (int k = 0; k < N; ++k)
          g[k] = by.template of_logits<D>(shifted(s[k], s_shift), shifted(t[k], t_shift), rates,
                                          i + k == label);
      }
      store_vector<S>(g, call, kToStudent, start, i);
    }
  }

  // One row, whose losses are added to the total.
  __device__ __forceinline__ void run(uint32_t row, Losses& total) const {
    const auto start = start_of<N>(call, row);
    const bool is_ignored = ignores(call, row);
    const int64_t label = label_of(call, row);
    RowState<A> state;
    if (!is_ignored) state = sums(start);
    // Before the barrier behind which the gradient may take the logits' place.
    const double logit =
        threadIdx.x == 0 && !is_ignored ? logit_of<S>(call, start.at[kStudent], label) : 0;
    merge_over_block(state, shared.of_warps, MergeLanes<D, A>{rates, with_logits});
    if (threadIdx.x == 0) {
      if (is_ignored)
        write_ignored_row<A>(call, row);
      else
        write_row(call, row, state, losses_of<D>(state, rates, call, label, logit), total);
    }
    if (call.sides[kToStudent].data == nullptr) return;
    RowFactors<A> by(D(), state, call.inverse, rates, weights.times(grad_output_of<A>(call, row)),
                     label);
    by.any = by.any && !is_ignored;
    emit(start, state, by, label);
  }
};

template <class D, class A, class S, class T>
__global__ void __launch_bounds__(kBlockRowThreads, sizeof(A) == 8 ? 1 : kTogether)
    soft_target_stream_kernel(const __grid_constant__ Call call, int64_t vectors, int kept,
                              const Tickets tickets) {
  BlockShared<A>& shared = shared_memory<BlockShared<A>>();
  const double counted = counted_rows(call, shared.losses);
  const Streamed<D, A, S, T> streamed{
      call,          shared,         vectors,
      kept,          Rates<A>(call), Weights<A>(call, divisor_of(call, counted), 1),
      call.smooths()};
  Losses total;
  for (uint32_t row = blockIdx.x;; row += gridDim.x) {
    streamed.run(row, total);
    if (call.rows - row <= gridDim.x) break;
  }
  write_loss<A>(call, total, counted, tickets, shared.losses);
}

template <class D, class A, class S, class T>
void launch_typed(D, A, S*, T*, const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr auto kernel = soft_target_stream_kernel<D, A, S, T>;
  constexpr int N = kClasses<A, S, T>;
  const int64_t vectors = vectors_of(call, N);
  const int threads =
      int(std::min<int64_t>((vectors + kWarp - 1) / kWarp * kWarp, kBlockRowThreads));
  Grid grid{1, threads, kHeader<BlockShared<A>>};
  int64_t kept = 0;
  if (sizeof(A) == 4 && call.sides[kToStudent].data != nullptr) {
    const int64_t bytes = int64_t(threads) * 2 * N * int64_t(sizeof(A));
    const int64_t capacity =
        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, stream) / kTogether - kSystemBytes -
        int64_t(grid.shared_bytes);
    kept = std::min(capacity / bytes, (vectors + threads - 1) / threads);
    grid.shared_bytes += size_t(kept * bytes);
  }
  grid.blocks =
      std::min({int64_t(call.rows), resident_clusters(kernel, grid, stream), kMostBlocks});
  launch(kernel, grid, stream, call, vectors, int(kept), scratch.tickets(call, stream));
}

}  // namespace

void launch_stream(const Call& call, const Scratch& scratch, const Stream& stream) {
  with_types_of(call, [&](auto divergence, auto* one, auto* other) {
    if constexpr (std::is_same_v<decltype(one), Any*>)
      if (call.is_double)
        return launch_typed(divergence, double(), one, other, call, scratch, stream);
    launch_typed(divergence, float(), one, other, call, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
