// Long rows of a student and one teacher, a block's or a cluster's each. A thread reads its classes
// once, keeps their exponentials in registers, and writes the gradient from there, while the next
// row is on its way from memory to shared memory.
//
// Every warp sends its sums to every block of the cluster. The first warp of each block puts them
// together, while the next one looks up the row after the next: so a round has one barrier. The
// logarithms of 32 rows are a warp's, a lane each.
#include "soft_target_long_exact.h"
#include "soft_target_long_gradient.h"
#include "soft_target_long_losses.h"
#include "soft_target_long_queue.h"

namespace fastkd::cuda {
namespace logits {
namespace {

template <int N>
struct PairStarts {
  const Call& call;

  __device__ __forceinline__ void find(uint32_t row, int, Start<>& to) const {
    if (threadIdx.x % kWarp == 0) to = start_of<N>(call, row);
  }
};

template <class D, bool kIsCluster, class S, class T, int V>
struct LongRows {
  using RowPair = Pair<kIsCluster, S, T, V>;
  static constexpr int N = RowPair::N;
  using Classes = float[V * N];

  const RowPair& part;
  LongShared& shared;
  const Call& call = part.call;
  const Share& share = part.share;
  const Queue<S, PairStarts<N>> queue{call, share, shared, {call}};
  const LongLosses<typename RowPair::RowPart> losses{part, shared};
  const Exponents rates = Exponents(call, true);
  const int warp = part.warp, lane = part.lane, warps = part.warps;

  // The warp's state of a row, whose classes become their exponentials and what is kept of them.
  __device__ __forceinline__ RowState<float> sums(const Held<S, N, V>& s, const Held<T, N, V>& t,
                                                  Classes& es, Classes& kept) const {
    RowState<float> own;
    const float2 maxima{warp_max(s.largest()), warp_max(t.largest())};
    const float cs = rates.origin(maxima.x), ct = rates.origin(maxima.y);
    // In shared memory they take no registers.
    if (lane == 0) shared.own_max[warp] = maxima;
    __syncwarp();
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float x[N], y[N];
      s.widen_to(v, x);
      t.widen_to(v, y);
#pragma unroll
      for (int k = 0; k < N; ++k)
        add_exponents<D>(own, fmaf(x[k], rates.rate(), -cs), fmaf(y[k], rates.rate(), -ct),
                         es[v * N + k], kept[v * N + k]);
      if (call.has_hard) own.hard += exponentials_at_one(x, part.of_hard(v));
    }
    add_over_lanes<kWarp>(own, call.has_hard, false);
    own.student_max = shared.own_max[warp].x;
    own.teacher_max = shared.own_max[warp].y;
    return own;
  }
  // In shared memory, where it takes no registers.
  __device__ __forceinline__ void keep_sum_of_logits(int phase) const {
    const double sum = part.template sum_of_logits<S>(call.sides[kStudent].dtype, phase);
    if (lane == 0) shared.logits[warp] = sum;
    __syncwarp();
  }
  __device__ __forceinline__ float exponentials_at_one(const float (&x)[N], const Stage& to) const {
    const float origin = rates.hard_origin(shared.own_max[warp].x);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float eh = exp2_of(fmaf(x[k], Exponents::kHardRate, -origin));
      sum += eh;
      to.template put<float>(k, eh);
    }
    return sum;
  }

  // Puts the states of all warps together, and the factors of the row with them.
  __device__ __forceinline__ void collect(const QueuedRow& row, const Exponents& units, int step,
                                          int found) const {
    if (warp != 0) return;
    const int all = warps * share.blocks;
    const RowState<float>* const parts = part.receive(shared, step);
    const RowState<float> state = merged(parts, all, units);
    if (lane == 0) publish(state, units, row, found);
  }
  __device__ __forceinline__ RowState<float> merged(const RowState<float>* parts, int all,
                                                    const Exponents& units) const {
    float s_max = -INFINITY, t_max = -INFINITY;
#pragma unroll 1
    for (int i = lane; i < all; i += kWarp) {
      s_max = fmaxf(s_max, parts[i].student_max);
      t_max = fmaxf(t_max, parts[i].teacher_max);
    }
    RowState<float> row;
    row.student_max = warp_max(s_max);
    row.teacher_max = warp_max(t_max);
#pragma unroll 1
    for (int i = lane; i < all; i += kWarp) {
      RowState<float> part = parts[i];
      part.template move<D>(row.student_max, row.teacher_max, units);
      row.take(part);
    }
    add_over_lanes<kWarp>(row, units.has_hard, call.smooths());
    return row;
  }
  __device__ __forceinline__ void publish(const RowState<float>& row, const Exponents& units,
                                          const QueuedRow& of, int found) const {
    shared.is_served = units.serve(row);
    shared.repeats += !units.is_rounded;
    shared.row = row;
    shared.factors = RowFactors<float>(D(), row, units.inverse(), units, of.weights, of.label);
    if (part.rank() == 0)
      shared.found[found % kFound] = {row, of.row, of.label, of.logit, units.is_rounded};
  }

  // The row's, for the exponentials of this warp.
  __device__ __forceinline__ RowFactors<float> factors() const {
    RowFactors<float> by = shared.factors;
    const float2 own_max = shared.own_max[warp];
    by.template move<D>(own_max.x, own_max.y, shared.row, rates);
    return by;
  }

  __device__ __forceinline__ void run() const {
    const ExactRow<D, kIsCluster, S, T, V> exact{part, shared};
    const HeldGradient<D, S, typename RowPair::RowPart> gradient{part};
    part.fetch(queue.row(0));
#pragma unroll 1
    for (int index = 0;; ++index) {
      const QueuedRow& row = queue.row(index);
      const bool is_end = row.row == call.rows;
      const int together = index % kWarp;
      if (together == 0 ? index > 0 : is_end)
        losses.template write<D>(index, together == 0 ? kWarp : together);
      if (is_end) break;
      __pipeline_wait_prior(0);
      Held<S, N, V> s, t;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        s.load(v, part.of_student(v), call.sides[kStudent].dtype);
        t.load(v, part.of_teacher(v), call.sides[kTeacher].dtype);
      }
      if (call.smooths()) keep_sum_of_logits(row.start.phase);
      part.fetch(queue.row(index + 1));
      // Before the lanes wait for one another in the sums: whoever sends lets others go on.
      const int first_step = index + shared.repeats;
      Classes es, kept;
      RowState<float> own = sums(s, t, es, kept);
      if (call.smooths()) own.logits = shared.logits[warp];
      bool is_rounded = true;
      for (;;) {
        const int step = first_step + !is_rounded;
        part.send(shared, own, step);
        if (is_rounded) queue.look_ahead(index + 2);
        collect(row, Exponents(call, is_rounded), step, index);
        __syncthreads();
        if (shared.is_served) break;
        is_rounded = false;
        own = exact.sums(row.start);
      }
      if (!part.has_gradient()) continue;
      if (is_rounded)
        gradient.write(row, factors(), es, kept);
      else
        exact.write_gradient(row);
    }
    if (shared.counted < call.rows)
      queue.over_ignored_rows(
          [&](uint32_t row) { part.template write_ignored<S>(row, start_of<N>(call, row)); });
  }
};

// V vectors of a row, and of every row, are a thread's.
template <class D, bool kIsCluster, class S, class T, int V>
__global__ void __launch_bounds__(kMostThreads, 1)
    soft_target_long_rows_kernel(const __grid_constant__ Call call,
                                 const __grid_constant__ Share share,
                                 const __grid_constant__ Tickets tickets) {
  if constexpr (kIsCluster && !kHasClusters) return;
  LongShared& shared = shared_memory<LongShared>();
  const Pair<kIsCluster, S, T, V> part{{call, share, after<char>(shared)}};
  const LongRows<D, kIsCluster, S, T, V> rows{part, shared};
  part.fill_absent();
  rows.losses.open(rows.queue);
  if constexpr (kIsCluster) shared.parts.open();
  rows.run();
  rows.losses.close(tickets);
}

template <class D, bool kIsCluster, class S, class T, int V>
bool launch_with(const Call& call, const Blocks& blocks, const Scratch& scratch,
                 const Stream& stream) {
  return launch_long<typename Pair<kIsCluster, S, T, V>::RowPart, LongShared>(
      soft_target_long_rows_kernel<D, kIsCluster, S, T, V>, call, call, blocks, scratch, stream);
}

template <class D, class S, class T>
bool launch_typed(D, S*, T*, const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr int few = kFewVectors<S>, most = kMostVectors<S>;
  for (const Blocks& blocks : kTeams) {
    const bool is_cluster = blocks.cluster > 1;
    if (is_cluster ? launch_with<D, true, S, T, few>(call, blocks, scratch, stream)
                   : launch_with<D, false, S, T, few>(call, blocks, scratch, stream))
      return true;
    if (is_cluster && few < most && launch_with<D, true, S, T, most>(call, blocks, scratch, stream))
      return true;
  }
  return false;
}

}  // namespace

bool launch_long_rows(const Call& call, const Scratch& scratch, const Stream& stream) {
  if (call.rate * float(kLogitScale) < FLT_MIN) return false;
  return with_types_of(call, [&](auto divergence, auto* one, auto* other) {
    return launch_typed(divergence, one, other, call, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
