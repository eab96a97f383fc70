// Rows of a student and several teachers that stay on the chip: a warp, a block or a cluster of
// blocks reads one tensor's row after the other, and keeps in registers what the teachers amount
// to.
//
// The next row, of whichever tensor, is on its way from memory to shared memory meanwhile. Each
// thread fetches what it will compute itself, so nobody waits for anybody before a row's sums.
#include "cluster.h"
#include "soft_target_ensemble.h"
#include "soft_target_slots.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kMostWarps = kMostThreads / kWarp;

// Classes of a vector: 16 bytes of half precision, and twice as many of float32.
constexpr int N = kVector<Any, Any>;
constexpr int kPlanes = planes_of<Any>(N);
constexpr int kFewVectors = 1, kManyVectors = 4;

struct EnsembleShared {
  Part<float> of_warps[2][kMostWarps];
  Mailbox<Part<float>, kMostCluster> of_blocks;
  Losses totals[kMostWarps];
  double warps[kMostWarps];
  double kept;
  Weights<float> weights;
  bool is_last;
};

// What a launch shares out. As parameters these take no registers.
struct EnsembleShare {
  int all;      // vectors of a row
  int vectors;  // of these to each block, or warp
  int blocks;   // to a row
  uint32_t teams;
};

// V vectors of a row, and of every row, are a thread's.
template <Scope kScope, int V>
__global__ void __launch_bounds__(kScope == Scope::warp ? kWarpRowThreads : kMostThreads,
                                  kScope == Scope::warp ? blocks_together(V * N) : 1)
    soft_target_ensemble_rows_kernel(const __grid_constant__ Ensemble ensemble,
                                     const EnsembleShare share, const Tickets tickets) {
  if constexpr (kScope == Scope::cluster && !kHasClusters) return;
  constexpr bool kIsWarp = kScope == Scope::warp, kIsCluster = kScope == Scope::cluster;
  EnsembleShared& shared = shared_memory<EnsembleShared>();
  const Call& call = ensemble.call;
  if (call.in_place && *static_cast<const float*>(call.grad_output) == 1) return;
  const Rates<float> rates(call);
  const float of_logarithm = float(ensemble.of_logarithm), of_logit = float(ensemble.of_logit);
  const bool smooths = call.smoothing > 0 && call.labels != nullptr;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int threads = kIsWarp ? kWarp : int(blockDim.x);
  const int thread = kIsWarp ? lane : int(threadIdx.x);
  const auto rank = [] { return kIsCluster ? int(cluster_rank()) : 0; };
  const uint32_t first =
      kIsWarp ? blockIdx.x * (blockDim.x / kWarp) + warp : blockIdx.x / unsigned(share.blocks);
  const bool leads = thread == 0 && rank() == 0;
  const int classes = int(call.classes);
  const int plane_bytes = threads * kAccess;
  // Fetched vectors, and after all of them the exponentials at temperature 1.
  const auto slot = [&](int v, bool is_sharp = false) {
    const int teams = kIsWarp ? int(blockDim.x / kWarp) : 1;
    const int place = (is_sharp ? teams : 0) + (kIsWarp ? warp : 0);
    return reinterpret_cast<char*>(&shared) + kHeader<EnsembleShared> +
           ((place * V + v) * kPlanes * threads + thread) * kAccess;
  };
  // Whether this thread has a vector, which is the row's from class i on; a cluster's last blocks
  // may have fewer.
  const auto place_of = [&](int v, int phase, int& i) {
    const int in_block = v * threads + thread;
    i = (rank() * share.vectors + in_block) * N - phase;
    return in_block <
           (kIsCluster ? min(share.vectors, share.all - rank() * share.vectors) : share.vectors);
  };
  const auto start_of_sides = [&](uint32_t row) {
    Start<> start;
    locate(call, row, start.at);
    start.phase = phase_of<N>(call, start.at[kStudent]);
    start.is_aligned = is_aligned(call.sides[kToStudent], start.at[kToStudent], start.phase);
    return start;
  };
  const auto give_vector = [&](const float (&g)[N], int i, const Start<>& start) {
    give<Any>(g, call.sides[kToStudent], start.at[kToStudent], i, classes, start.is_aligned);
  };
  // The first row from `row` on that counts. Those before it are done with here.
  const auto find = [&](uint32_t row) {
    while (row < call.rows && ignores(call, row)) {
      if (leads) write_losses<float>(call, row, Losses{0, 0});
      if (call.sides[kToStudent].data != nullptr) {
        const auto start = start_of_sides(row);
        const float zeros[N] = {};
#pragma unroll 1
        for (int v = 0, i; v < V; ++v)
          if (place_of(v, start.phase, i)) give_vector(zeros, i, start);
      }
      row = call.rows - row > share.teams ? row + share.teams : call.rows;
    }
    return row;
  };
  const auto fetch_row = [&](const Tensor& from, int64_t at, int phase) {
    const bool by_vectors = is_aligned(from, at, phase);
    // Rolled: the addresses of all vectors would take registers that the exponentials need.
#pragma unroll 1
    for (int v = 0, i; v < V && place_of(v, phase, i); ++v) {
      if (by_vectors && i >= 0 && i + N <= classes)
        fetch<Any, N>(slot(v), plane_bytes, from, at, i);
      else
        fetch_elements<Any, N>(slot(v), plane_bytes, from, at, i, classes);
    }
    __pipeline_commit();
  };
  const auto fetch_teacher = [&](uint32_t row, int m, int phase) {
    fetch_row(ensemble.teachers[m].tensor, start_of_teacher(ensemble, row, m), phase);
  };
  // Waits for the row that was sent for last; where there is none there are excluded classes.
  const auto take_row = [&](DType dtype, float (&to)[V* N]) {
    __pipeline_wait_prior(0);
    with_storage(dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        int i;
        if (place_of(v, 0, i)) {
          take<E, N>(slot(v), plane_bytes, dtype, to + v * N);
        } else {
#pragma unroll
          for (int k = 0; k < N; ++k) to[v * N + k] = -INFINITY;
        }
      }
    });
  };
  // The team's, in every thread, from what this lane has. `step` counts such sums. Nobody
  // overwrites a part that somebody has yet to read: two steps later everybody has come to the step
  // between.
  int step = 0;
  const auto over_team = [&](Part<float>& part, auto is_student) {
    constexpr bool kIsStudent = decltype(is_student)::value;
    merge_over_lanes<kWarp, kIsStudent>(part, rates, of_logit, smooths);
    if constexpr (!kIsWarp) {
      Part<float>* const parts = shared.of_warps[step % 2];
      if (lane == 0) parts[warp] = part;
      __syncthreads();
      if (!kIsCluster || warp == 0) {
        const int other = lane % kMostWarps;
        part = other < int(blockDim.x / kWarp) ? parts[other] : Part<float>();
        merge_over_lanes<kMostWarps, kIsStudent>(part, rates, of_logit, smooths);
      }
      if constexpr (kIsCluster) {
        if (warp == 0) {
          if (lane == 0) shared.of_blocks.expect(step);
          if (lane < share.blocks) shared.of_blocks.send(part, unsigned(lane), step);
        }
        const Part<float>* const letters = shared.of_blocks.receive(step);
        const int other = lane % kMostCluster;
        part = other < share.blocks ? letters[other] : Part<float>();
        merge_over_lanes<kMostCluster, kIsStudent>(part, rates, of_logit, smooths);
      }
      ++step;
    }
  };

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
  uint32_t row = find(first < call.rows ? first : call.rows);
  if (row < call.rows) fetch_teacher(row, 0, start_of_sides(row).phase);
  while (row < call.rows) {
    float p[V * N];
#pragma unroll
    for (float& x : p) x = -0.0f;
#pragma unroll 1
    for (int m = 0; m < ensemble.count; ++m) {
      float t[V * N];
      take_row(ensemble.teachers[m].tensor.dtype, t);
      {
        const auto start = start_of_sides(row);
        if (m + 1 < ensemble.count)
          fetch_teacher(row, m + 1, start.phase);
        else
          fetch_row(call.sides[kStudent], start.at[kStudent], start.phase);
      }
      Part<float> part;
#pragma unroll
      for (float x : t) part.maximum = fmaxf(part.maximum, x);
      part.maximum = over_lanes_max<kWarp>(part.maximum);
      const float own_maximum = part.maximum, own_shift = shift(own_maximum);
#pragma unroll
      for (float& x : t) {
        x = signed_exp2(shifted(x, own_shift), rates.softened);
        part.sum += x;
      }
      over_team(part, std::false_type());
      const float by = float(ensemble.teachers[m].weight) / part.sum *
                       moving(own_maximum, part.maximum, rates.softened);
#pragma unroll
      for (int j = 0; j < V * N; ++j) p[j] += t[j] * by;
    }

    float s[V * N];  // logits, and then their exponentials
    take_row(call.sides[kStudent].dtype, s);
    const uint32_t next = find(call.rows - row > share.teams ? row + share.teams : call.rows);
    if (next < call.rows) fetch_teacher(next, 0, start_of_sides(next).phase);
    Part<float> part;
#pragma unroll
    for (float x : s) part.maximum = fmaxf(part.maximum, x);
    part.maximum = over_lanes_max<kWarp>(part.maximum);
    const float own_maximum = part.maximum, own_shift = shift(own_maximum);
    if (smooths) {
      const int phase = start_of_sides(row).phase;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        int i;
        if (!place_of(v, phase, i)) continue;
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (i + k >= 0 && i + k < classes) part.logits += double(s[v * N + k]) * kLogitScale;
      }
    }
    if (rates.third)
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float eh = exp2_of(shifted(s[v * N + k], own_shift) * rates.sharp);
          part.hard += eh;
          put<float>(slot(v, true), plane_bytes, k, eh);
        }
#pragma unroll
    for (int j = 0; j < V * N; ++j) {
      const float x = shifted(s[j], own_shift);
      s[j] = exp2_of(x * rates.softened);
      part.sum += s[j];
      part.mass += p[j];
      part.difference += difference_of(p[j], x, of_logarithm, of_logit);
    }
    over_team(part, std::true_type());

    const auto start = start_of_sides(row);
    const int label = int(label_of(call, row));
    if (call.sides[kToStudent].data != nullptr) {
      const Sums<float> sums = as_sums(part, 1.0f);
      Factors<float> by(sums, rates, weights_of(call, row, shared.weights));
      by.move(own_maximum, 0, sums, rates);
      if (label == kWrongLabel) by.smoothing = NAN;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        int i;
        if (!place_of(v, start.phase, i)) continue;
        float g[N] = {};
        if (rates.third) take<float, N>(slot(v, true), plane_bytes, DType::f32, g);
#pragma unroll
        for (int k = 0; k < N; ++k)
          g[k] = gradient_of(by, s[v * N + k], p[v * N + k], g[k], rates.third,
                             label >= 0 && i + k == label);
        give_vector(g, i, start);
      }
    }
    // Here, where no exponential waits in a register.
    if (leads) {
      double logit = 0;
      if (label >= 0) logit = logit_of<Any>(call.sides[kStudent], start.at[kStudent], label);
      const Losses losses = losses_of(as_sums(part, part.mass), rates, call, label, logit);
      shared.totals[warp].kl += losses.kl;
      shared.totals[warp].ce += losses.ce;
      write_losses<float>(call, row, losses);
    }
    row = next;
  }
  write_loss<float>(call, leads ? shared.totals[warp] : Losses{0, 0}, shared.kept, tickets,
                    shared.warps, shared.is_last);
}

template <Scope kScope, int V>
bool launch_if_it_fits(const Ensemble& ensemble, int threads, int cluster, const Scratch& scratch,
                       const Stream& stream) {
  constexpr auto kernel = soft_target_ensemble_rows_kernel<kScope, V>;
  const Call& call = ensemble.call;
  const int64_t vectors = vectors_of(call, N);
  const int64_t of_block = (vectors + cluster - 1) / cluster;
  if (of_block > int64_t(kScope == Scope::warp ? kWarp : threads) * V) return false;
  if (kScope != Scope::warp) threads = int((of_block + V * kWarp - 1) / (V * kWarp)) * kWarp;
  const size_t slots = size_t(threads) * V * kPlanes * kAccess;
  const bool has_third = call.labels != nullptr && call.temperature != 1;
  const Grid grid{1, threads, kHeader<EnsembleShared> + (has_third ? 2 : 1) * slots, cluster};
  const int64_t resident = resident_clusters(kernel, grid, stream);
  if (resident == 0) return false;
  const int64_t teams = kScope == Scope::warp ? threads / kWarp : 1;
  Grid whole = grid;
  whole.blocks =
      std::min({(int64_t(call.rows) + teams - 1) / teams, resident, kMostBlocks / cluster}) *
      cluster;
  launch(
      kernel, whole, stream, ensemble,
      EnsembleShare{int(vectors), int(of_block), cluster, uint32_t(whole.blocks / cluster * teams)},
      scratch.tickets(stream));
  return true;
}

}  // namespace

bool launch_ensemble_rows(const Ensemble& ensemble, const Scratch& scratch, const Stream& stream) {
  constexpr int kFewest = kFewVectors, kMost = kManyVectors;
  if (launch_if_it_fits<Scope::warp, kFewest>(ensemble, kWarpRowThreads, 1, scratch, stream) ||
      launch_if_it_fits<Scope::warp, kMost>(ensemble, kWarpRowThreads, 1, scratch, stream) ||
      launch_if_it_fits<Scope::block, kMost>(ensemble, kBlockThreads, 1, scratch, stream))
    return true;
  for (const auto& [threads, cluster] : kClusters)
    if (launch_if_it_fits<Scope::cluster, kMost>(ensemble, threads, cluster, scratch, stream))
      return true;
  return launch_if_it_fits<Scope::block, kMost>(ensemble, kMostThreads, 1, scratch, stream);
}

}  // namespace logits
}  // namespace fastkd::cuda
