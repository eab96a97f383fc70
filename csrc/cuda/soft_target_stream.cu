// Rows of any length and strides, a block each: one pass over the logits for the sums, relative to
// maxima that rise on the way, and a second one for the gradient. What there is room for stays in
// shared memory between the two.
#include "soft_target_forms.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kMostThreads = 256;
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr int kTogether = 3;  // blocks on a multiprocessor

template <class A>
struct Shared {
  Sums<A> of_warps[kMostWarps];
  double warps[kMostWarps];
  bool is_last;
};

// `vectors` in a row, of which each thread keeps its first `kept` in shared memory, as A.
template <class A, class S, class T>
__global__ void __launch_bounds__(kMostThreads, sizeof(A) == 8 ? 1 : kTogether)
    soft_target_stream_kernel(const __grid_constant__ Call call, int64_t vectors, int kept,
                              const Tickets tickets) {
  constexpr bool kIsDouble = sizeof(A) == 8;
  constexpr int N = kIsDouble ? 1 : kVector<S, T>;
  Shared<A>& shared = shared_memory<Shared<A>>();
  A* const own_slots =
      reinterpret_cast<A*>(reinterpret_cast<char*>(&shared) + kHeader<Shared<A>>) + threadIdx.x;
  const auto slot = [&](int v, int k) -> A& {
    return own_slots[(v * 2 * N + k) * int(blockDim.x)];
  };
  const Rates<A> rates(call);
  const bool smooths = call.smoothing > 0 && call.labels != nullptr;
  const int threads = int(blockDim.x);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const double rows_kept = kept_rows(call, shared.warps);
  const Weights<A> weights(call, divisor_of(call, rows_kept), 1);
  Losses total{0, 0};
  for (uint32_t row = blockIdx.x;;) {
    const auto start = start_of<N>(call, row);
    const bool is_ignored = ignores(call, row);
    const int64_t label = label_of(call, row);
    Sums<A> own;
    int v = 0;
    for (int64_t at = threadIdx.x; at < vectors && !is_ignored; at += threads, ++v) {
      A s[N], t[N];
      const int64_t i = at * N - start.phase;
      take<A, S>(call.sides[kStudent], start.at[kStudent], i, call.classes, start.is_aligned, s);
      take<A, T>(call.sides[kTeacher], start.at[kTeacher], i, call.classes, start.is_aligned, t);
      if (v < kept) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          slot(v, k) = s[k];
          slot(v, N + k) = t[k];
        }
      }
      add(own, s, t, -i, call.classes - i, rates, smooths);
    }
    merge_over_lanes<kWarp>(own, rates, smooths);
    if (lane == 0) shared.of_warps[warp] = own;
    __syncthreads();
    own = Sums<A>();
    if (lane < threads / kWarp) own = shared.of_warps[lane];
    merge_over_lanes<kWarp>(own, rates, smooths);
    __syncthreads();

    if (threadIdx.x == 0) {
      if (is_ignored) {
        write_row(call, row, Sums<A>{0, 0}, Losses{0, 0});
      } else {
        const double logit =
            label < 0 ? 0 : logit_of<S>(call.sides[kStudent], start.at[kStudent], label);
        const Losses losses = losses_of(own, rates, call, label, logit);
        total.kl += losses.kl;
        total.ce += losses.ce;
        write_row(call, row, own, losses);
      }
    }
    if (call.sides[kToStudent].data != nullptr) {
      Factors<A> by(own, rates, weights);
      if (label == kWrongLabel) by.smoothing = A(NAN);
      by.any = by.any && !is_ignored;
      const A s_shift = shift(own.student_max), t_shift = shift(own.teacher_max);
      v = 0;
      for (int64_t at = threadIdx.x; at < vectors; at += threads, ++v) {
        A g[N] = {};
        const int64_t i = at * N - start.phase;
        if (by.any) {
          A s[N], t[N];
          if (v < kept) {
#pragma unroll
            for (int k = 0; k < N; ++k) {
              s[k] = slot(v, k);
              t[k] = slot(v, N + k);
            }
          } else {
            take<A, S>(call.sides[kStudent], start.at[kStudent], i, call.classes, start.is_aligned,
                       s);
            take<A, T>(call.sides[kTeacher], start.at[kTeacher], i, call.classes, start.is_aligned,
                       t);
          }
#pragma unroll
          for (int k = 0; k < N; ++k)
            g[k] = gradient_of(by, shifted(s[k], s_shift), shifted(t[k], t_shift), rates,
                               i + k == label);
        }
        give<S>(g, call.sides[kToStudent], start.at[kToStudent], i, call.classes, start.is_aligned);
      }
    }
    if (call.rows - row <= gridDim.x) break;
    row += gridDim.x;
  }
  write_loss<A>(call, total, rows_kept, tickets, shared.warps, shared.is_last);
}

template <class A, class S, class T>
void launch_typed(const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr auto kernel = soft_target_stream_kernel<A, S, T>;
  constexpr int N = sizeof(A) == 8 ? 1 : kVector<S, T>;
  const int64_t vectors = vectors_of(call, N);
  const int threads = int(std::min<int64_t>((vectors + kWarp - 1) / kWarp * kWarp, kMostThreads));
  Grid grid{1, threads, kHeader<Shared<A>>};
  int64_t kept = 0;
  if (sizeof(A) == 4 && call.sides[kToStudent].data != nullptr) {
    const int64_t slots = int64_t(threads) * 2 * N * int64_t(sizeof(A));
    const int64_t room =
        attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, stream) / kTogether - kSystemBytes -
        int64_t(grid.shared_bytes);
    kept = std::min(room / slots, (vectors + threads - 1) / threads);
    grid.shared_bytes += size_t(kept * slots);
  }
  grid.blocks =
      std::min({int64_t(call.rows), resident_clusters(kernel, grid, stream), kMostBlocks});
  launch(kernel, grid, stream, call, vectors, int(kept), scratch.tickets(stream));
}

}  // namespace

void launch_stream(const Call& call, const Scratch& scratch, const Stream& stream) {
  if (is_double(call)) return launch_typed<double, Any, Any>(call, scratch, stream);
  with_storage_of(call, [&](auto* one, auto* other) {
    using S = std::remove_pointer_t<decltype(one)>;
    using T = std::remove_pointer_t<decltype(other)>;
    launch_typed<float, S, T>(call, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
