// Rows that stay on the chip: a warp, a block or a cluster of blocks reads a row once, keeps its
// exponentials in registers, and writes the gradient from there.
//
// The next rows are on their way from memory to shared memory meanwhile. Each thread fetches what
// it will compute itself, so nobody waits for anybody before the sums of the row.
#include "cluster.h"
#include "soft_target_slots.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kMostWarps = kMostThreads / kWarp;

struct Shared {
  Sums<float> of_warps[kMostWarps];
  Mailbox<Sums<float>, kMostCluster> of_blocks;
  // Of a warp's own row, or of the block's or cluster's in the first.
  Sums<float> rows[kMostWarps];
  Factors<float> factors[kMostWarps];
  Losses totals[kMostWarps];
  double logits[kMostWarps];  // for label smoothing
  double warps[kMostWarps];
  double kept;
  Weights<float> weights;
  bool is_last;
};

// A thread's share of a row in shared memory: vectors of both sides, in planes of 16 bytes a
// thread. The third exponentials take the place of what was computed.
template <class S, class T, int V>
struct Stage {
  static constexpr int N = kVector<S, T>;
  static constexpr int kOfStudent = planes_of<S>(N), kOfTeacher = planes_of<T>(N);
  static constexpr int kPlanes = kOfStudent + kOfTeacher;
  static_assert(kPlanes * kAccess >= N * int(sizeof(float)));

  char* slots;
  int plane_bytes;

  __device__ char* side(int v, Side side) const {
    return slots + (v * kPlanes + (side == kTeacher ? kOfStudent : 0)) * plane_bytes;
  }
};

// What a launch shares out. As parameters these take no registers.
struct Share {
  int all;      // vectors of a row
  int vectors;  // of these to each block, or warp
  int blocks;   // to a row
  uint32_t teams;
};

// V vectors of a row, and of every row, are a thread's.
template <Scope kScope, class S, class T, int V>
__global__ void __launch_bounds__(kScope == Scope::warp ? kWarpRowThreads : kMostThreads,
                                  kScope == Scope::warp ? blocks_together(V * kVector<S, T>) : 1)
    soft_target_rows_kernel(const __grid_constant__ Call call, const Share share,
                            const Tickets tickets) {
  if constexpr (kScope == Scope::cluster && !kHasClusters) return;
  constexpr int N = kVector<S, T>;
  constexpr bool kIsWarp = kScope == Scope::warp, kIsCluster = kScope == Scope::cluster;
  Shared& shared = shared_memory<Shared>();
  const Rates<float> rates(call);
  const bool smooths = call.smoothing > 0 && call.labels != nullptr;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int threads = kIsWarp ? kWarp : int(blockDim.x);
  const int thread = kIsWarp ? lane : int(threadIdx.x);
  const auto rank = [] { return kIsCluster ? int(cluster_rank()) : 0; };
  const uint32_t first =
      kIsWarp ? blockIdx.x * (blockDim.x / kWarp) + warp : blockIdx.x / unsigned(share.blocks);
  const bool leads = thread == 0 && rank() == 0;
  const int classes = int(call.classes);
  char* const stages = reinterpret_cast<char*>(&shared) + kHeader<Shared>;

  using Slots = Stage<S, T, V>;
  const auto slots_of = [&](int stage) {
    const int place = kIsWarp ? stage * int(blockDim.x / kWarp) + warp : stage;
    return Slots{stages + (place * V * Slots::kPlanes * threads + thread) * kAccess,
                 threads * kAccess};
  };
  // The block's vectors; a cluster's last blocks may have fewer.
  const auto vectors_here = [&] {
    return kIsCluster ? min(share.vectors, share.all - rank() * share.vectors) : share.vectors;
  };
  // This thread's vectors of a row: where they are in it, or that they are not.
  const auto over_vectors = [&](const Start<>& start, const auto& f) {
    const int before = rank() * share.vectors, here = vectors_here();
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int in_block = v * threads + thread;
      if (in_block < here) f(v, (before + in_block) * N - start.phase);
    }
  };
  const auto place_of = [&](int v, const Start<>& start, int& i) {
    const int in_block = v * threads + thread;
    i = (rank() * share.vectors + in_block) * N - start.phase;
    return in_block < vectors_here();
  };
  // The first row from `row` on that counts. Those before it are done with here.
  const auto find = [&](uint32_t row) {
    while (row < call.rows && ignores(call, row)) {
      if (leads) write_row(call, row, Sums<float>{0, 0}, Losses{0, 0});
      if (call.sides[kToStudent].data != nullptr) {
        const auto start = start_of<N>(call, row);
        const float zeros[N] = {};
#pragma unroll 1
        for (int v = 0, i; v < V && place_of(v, start, i); ++v)
          give<S>(zeros, call.sides[kToStudent], start.at[kToStudent], i, classes,
                  start.is_aligned);
      }
      row = call.rows - row > share.teams ? row + share.teams : call.rows;
    }
    return row;
  };
  const auto is_whole = [&](int i) { return i >= 0 && i + N <= classes; };
  const auto fetch_row = [&](uint32_t row, const Slots& slots) {
    const auto start = start_of<N>(call, row);
    if (start.is_aligned) {
      // Rolled: the addresses of all vectors would take registers that the exponentials need.
#pragma unroll 1
      for (int v = 0, i; v < V && place_of(v, start, i); ++v) {
        if (!is_whole(i)) continue;
        fetch<S, N>(slots.side(v, kStudent), slots.plane_bytes, call.sides[kStudent],
                    start.at[kStudent], i);
        fetch<T, N>(slots.side(v, kTeacher), slots.plane_bytes, call.sides[kTeacher],
                    start.at[kTeacher], i);
      }
    }
    if (call.is_aligned && classes % N == 0) return;
#pragma unroll 1
    for (int v = 0, i; v < V && place_of(v, start, i); ++v) {
      if (start.is_aligned && is_whole(i)) continue;
      fetch_elements<S, N>(slots.side(v, kStudent), slots.plane_bytes, call.sides[kStudent],
                           start.at[kStudent], i, classes);
      fetch_elements<T, N>(slots.side(v, kTeacher), slots.plane_bytes, call.sides[kTeacher],
                           start.at[kTeacher], i, classes);
    }
  };

  // Slots that have no vector in any row are excluded classes for good.
#pragma unroll 1
  for (int v = 0; v < V; ++v) {
    if (v * threads + thread < vectors_here()) continue;
    for (int which = 0; which < (rates.third ? 2 : 1); ++which) {
      const Slots slots = slots_of(which);
      fetch_elements<S, N>(slots.side(v, kStudent), slots.plane_bytes, call.sides[kStudent], 0, 0,
                           0);
      fetch_elements<T, N>(slots.side(v, kTeacher), slots.plane_bytes, call.sides[kTeacher], 0, 0,
                           0);
    }
  }
  {
    const double kept = kept_rows(call, shared.warps);
    const Weights<float> weights(call, divisor_of(call, kept), 1);
    if (threadIdx.x == 0) {
      shared.kept = kept;
      shared.weights = weights;
    }
    if (leads) shared.totals[warp] = {0, 0};
    __syncthreads();
  }
  if constexpr (kIsCluster) shared.of_blocks.open();
  // In each turn the next row is sent for, and the one before it, if there is one, computed.
  uint32_t row = call.rows, next = first < call.rows ? first : call.rows;
  for (int round = -1;; ++round) {
    const bool has_row = round >= 0;
    const int turn = round & 1;
    const Slots slots = slots_of(rates.third ? turn : 0);
    float s[V * N], t[V * N];  // logits, and then their exponentials
    if (has_row) {
      __pipeline_wait_prior(0);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        take<S, N>(slots.side(v, kStudent), slots.plane_bytes, call.sides[kStudent].dtype,
                   s + v * N);
        take<T, N>(slots.side(v, kTeacher), slots.plane_bytes, call.sides[kTeacher].dtype,
                   t + v * N);
      }
    }
    next = find(next);
    if (next < call.rows) fetch_row(next, slots_of(rates.third ? turn ^ 1 : 0));
    __pipeline_commit();
    if (has_row) {
      Sums<float> own;
#pragma unroll
      for (int j = 0; j < V * N; ++j) {
        own.student_max = fmaxf(own.student_max, s[j]);
        own.teacher_max = fmaxf(own.teacher_max, t[j]);
      }
      own.student_max = over_lanes_max<kWarp>(own.student_max);
      own.teacher_max = over_lanes_max<kWarp>(own.teacher_max);
      const float s_shift = shift(own.student_max), t_shift = shift(own.teacher_max);
      if (smooths) {
        double logits = 0;
        over_vectors(start_of<N>(call, row), [&](int v, int i) {
#pragma unroll
          for (int k = 0; k < N; ++k)
            if (i + k >= 0 && i + k < classes) logits += double(s[v * N + k]);
        });
        logits = warp_sum(logits);
        if (lane == 0) shared.logits[warp] = logits * kLogitScale;
      }
      if (rates.third)
        over_vectors(Start<>{}, [&](int v, int) {
#pragma unroll
          for (int k = 0; k < N; ++k) {
            const float eh = exp2_of(shifted(s[v * N + k], s_shift) * rates.sharp);
            own.hard += eh;
            put<float>(slots.side(v, kStudent), slots.plane_bytes, k, eh);
          }
        });
#pragma unroll
      for (int j = 0; j < V * N; ++j) {
        const float x = shifted(s[j], s_shift), y = shifted(t[j], t_shift);
        s[j] = exp2_of(x * rates.softened);
        t[j] = exp2_of(y * rates.softened);
        own.student += s[j];
        own.teacher += t[j];
        if (y != -INFINITY) own.difference += t[j] * (y - x);
      }
      add_over_lanes<kWarp>(own, rates, false);
      if (lane == 0 && smooths) own.logits = shared.logits[warp];
      if constexpr (!kIsWarp) {
        if (lane == 0) shared.of_warps[warp] = own;
        __syncthreads();
      }
      // One warp puts the parts together; all would take longer, for they share the instructions
      // that a multiprocessor can issue.
      if (kIsWarp || warp == 0) {
        if constexpr (!kIsWarp) {
          const int part = lane % kMostWarps;
          own = part < int(blockDim.x / kWarp) ? shared.of_warps[part] : Sums<float>();
          merge_over_lanes<kMostWarps>(own, rates, smooths);
        }
        if constexpr (kIsCluster) {
          if (lane == 0) shared.of_blocks.expect(round);
          if (lane < share.blocks) shared.of_blocks.send(own, unsigned(lane), round);
          const Sums<float>* const letters = shared.of_blocks.receive(round);
          const int part = lane % kMostCluster;
          own = part < share.blocks ? letters[part] : Sums<float>();
          merge_over_lanes<kMostCluster>(own, rates, smooths);
        }
        if (lane == 0) {
          shared.rows[warp] = own;
          shared.factors[warp] = Factors<float>(own, rates, shared.weights);
        }
      }
      if constexpr (kIsWarp)
        __syncwarp();
      else
        __syncthreads();

      const int team = kIsWarp ? warp : 0;
      const auto start = start_of<N>(call, row);
      const int label = int(label_of(call, row));
      float label_logit = 0;
      if (leads && label >= 0)
        label_logit = float(logit_of<S>(call.sides[kStudent], start.at[kStudent], label));
      if (call.sides[kToStudent].data != nullptr) {
        Factors<float> by = shared.factors[team];
        if constexpr (!kIsWarp) {
          const Sums<float>& part = shared.of_warps[warp];
          by.move(part.student_max, part.teacher_max, shared.rows[0], rates);
        }
        if (label == kWrongLabel) by.smoothing = NAN;
        over_vectors(start, [&](int v, int i) {
          float g[N];
#pragma unroll
          for (int k = 0; k < N; ++k) {
            g[k] = s[v * N + k] * by.student - by.smoothing;
            if (by.soft) g[k] -= t[v * N + k] * by.teacher;
          }
          if (rates.third) {
            float eh[N];
            take<float, N>(slots.side(v, kStudent), slots.plane_bytes, DType::f32, eh);
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] += eh[k] * by.hard;
          }
          if (label >= 0 && label >= i && label < i + N) {
#pragma unroll
            for (int k = 0; k < N; ++k)
              if (i + k == label) g[k] -= by.label;
          }
          if (!by.any) {
#pragma unroll
            for (int k = 0; k < N; ++k) g[k] = 0;
          }
          give<S>(g, call.sides[kToStudent], start.at[kToStudent], i, classes, start.is_aligned);
        });
      }
      // Here, where no exponential waits in a register.
      if (leads) {
        const Losses losses = losses_of(shared.rows[warp], rates, call, label, label_logit);
        shared.totals[warp].kl += losses.kl;
        shared.totals[warp].ce += losses.ce;
        write_row(call, row, shared.rows[warp], losses);
      }
    }
    if (next == call.rows) break;
    row = next;
    next = call.rows - row > share.teams ? row + share.teams : call.rows;
  }
  write_loss<float>(call, leads ? shared.totals[warp] : Losses{0, 0}, shared.kept, tickets,
                    shared.warps, shared.is_last);
}

template <Scope kScope, class S, class T, int V>
bool launch_if_it_fits(const Call& call, int threads, int cluster, const Scratch& scratch,
                       const Stream& stream) {
  using Slots = Stage<S, T, V>;
  constexpr auto kernel = soft_target_rows_kernel<kScope, S, T, V>;
  const int64_t vectors = vectors_of(call, Slots::N);
  const int64_t of_block = (vectors + cluster - 1) / cluster;
  if (of_block > int64_t(kScope == Scope::warp ? kWarp : threads) * V) return false;
  if (kScope != Scope::warp) threads = int((of_block + V * kWarp - 1) / (V * kWarp)) * kWarp;
  const size_t stage = size_t(threads) * V * Slots::kPlanes * kAccess;
  const int stages = call.labels != nullptr && call.temperature != 1 ? 2 : 1;
  const Grid grid{1, threads, kHeader<Shared> + size_t(stages) * stage, cluster};
  const int64_t resident = resident_clusters(kernel, grid, stream);
  if (resident == 0) return false;
  const int64_t teams = kScope == Scope::warp ? threads / kWarp : 1;
  Grid whole = grid;
  whole.blocks =
      std::min({(int64_t(call.rows) + teams - 1) / teams, resident, kMostBlocks / cluster}) *
      cluster;
  launch(kernel, whole, stream, call,
         Share{int(vectors), int(of_block), cluster, uint32_t(whole.blocks / cluster * teams)},
         scratch.tickets(stream));
  return true;
}

template <class S, class T>
bool launch_typed(const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr int N = kVector<S, T>, held = std::is_same_v<S, Any> ? kMixedHeld : kHeld;
  constexpr int of_block = (std::is_same_v<S, float> ? kFloatHeld : held) / N;
  if (launch_if_it_fits<Scope::warp, S, T, kFew / N>(call, kWarpRowThreads, 1, scratch, stream) ||
      launch_if_it_fits<Scope::warp, S, T, held / N>(call, kWarpRowThreads, 1, scratch, stream) ||
      launch_if_it_fits<Scope::block, S, T, of_block>(call, kBlockThreads, 1, scratch, stream))
    return true;
  for (const auto& [threads, cluster] : kClusters)
    if (launch_if_it_fits<Scope::cluster, S, T, held / N>(call, threads, cluster, scratch, stream))
      return true;
  return launch_if_it_fits<Scope::block, S, T, of_block>(call, kMostThreads, 1, scratch, stream);
}

}  // namespace

bool launch_rows(const Call& call, const Scratch& scratch, const Stream& stream) {
  bool done = false;
  with_storage_of(call, [&](auto* one, auto* other) {
    using S = std::remove_pointer_t<decltype(one)>;
    using T = std::remove_pointer_t<decltype(other)>;
    done = launch_typed<S, T>(call, scratch, stream);
  });
  return done;
}

}  // namespace logits
}  // namespace fastkd::cuda
