// Long rows of a student and several teachers, a block's or a cluster's each. A thread reads its
// classes of one tensor after the other, and keeps in registers what the teachers amount to. The
// next row, of whichever tensor, is on its way from memory to shared memory meanwhile.
//
// Every warp sends the sum of a teacher's exponentials to every block, and puts all of them
// together itself. The first warp of each block puts the student's sums together.
#include "soft_target_long_gradient.h"
#include "soft_target_long_losses.h"
#include "soft_target_teachers_target.h"

namespace fastkd::cuda {
namespace logits {
namespace {

template <class D, bool kIsCluster, class S, int kVectors>
struct TeachersRows : TeachersTarget<kIsCluster, S, kVectors> {
  using Target = TeachersTarget<kIsCluster, S, kVectors>;
  using Target::call, Target::lane, Target::N, Target::of, Target::part, Target::queue;
  using Target::rates, Target::share, Target::shared, Target::V, Target::warp, Target::warps;
  using typename Target::Classes, typename Target::RowPart;

  // The warp's state of a row, of whose student's classes es become the exponentials; what is kept
  // of the classes takes the place of p.
  __device__ __forceinline__ RowState<float> sums(const Held<S, N, V>& s, Classes& es,
                                                  Classes& p) const {
    RowState<float> own;
    const float largest = warp_max(s.largest()), top = shift(largest);
    // In shared memory it takes no register.
    if (lane == 0) shared.own_max[warp].x = largest;
    __syncwarp();
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float x[N];
      s.widen_to(v, x);
      const bool is_here = part.has(v);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const int j = v * N + k;
        const float below = shifted(x[k], top);
        if (rates.has_hard) {
          const float eh = rates.exp_hard(below);
          own.hard += eh;
          part.of_hard(v).template put<float>(k, eh);
        }
        es[j] = rates.exp_soft(below);
        own.student += es[j];
        if (is_here) p[j] = add_mean<D>(own, es[j], p[j], below, rates);
      }
    }
    add_over_lanes<kWarp>(own, rates.has_hard, false);
    own.student_max = shared.own_max[warp].x;
    return own;
  }

  // Puts the states of all warps together, and the factors of the row with them.
  __device__ __forceinline__ void collect(const QueuedRow& row, int index) const {
    if (warp != 0) return;
    const int all = warps * share.blocks;
    const RowState<float>* const parts = part.receive(shared, index);
    RowState<float> state;
#pragma unroll 1
    for (int i = lane; i < all; i += kWarp)
      state.student_max = fmaxf(state.student_max, parts[i].student_max);
    state.student_max = warp_max(state.student_max);
#pragma unroll 1
    for (int i = lane; i < all; i += kWarp) {
      RowState<float> one = parts[i];
      MergeMeanLanes<D, float>{rates, false}.move(one, state.student_max);
      state.take(one);
    }
    add_over_lanes<kWarp>(state, rates.has_hard, call.smooths());
    if (lane != 0) return;
    shared.row = state;
    shared.factors = factors_of<D>(call, state, rates, row.weights, row.label);
    if (part.rank() == 0)
      shared.found[index % kFound] = {state, row.row, row.label, row.logit, false};
  }
  // The row's factors, for the exponentials of this warp.
  __device__ __forceinline__ RowFactors<float> factors() const {
    RowFactors<float> by = shared.factors;
    by.template move<D>(shared.own_max[warp].x, shared.row.teacher_max, shared.row, rates,
                        rates.of_logit);
    return by;
  }

  __device__ __forceinline__ void run() const {
    const HeldGradient<D, S, RowPart> gradient{part};
    const LongLosses<RowPart> losses{part, shared};
    this->fetch_teacher(0, 0);
#pragma unroll 1
    for (int index = 0;; ++index) {
      const QueuedRow& row = queue.row(index);
      const bool is_end = row.row == call.rows;
      const int together = index % kWarp;
      if (together == 0 ? index > 0 : is_end)
        losses.template write<D>(index, together == 0 ? kWarp : together);
      if (is_end) break;
      Classes p, es;
#pragma unroll
      for (float& x : p) x = -0.0f;
#pragma unroll 1
      for (int m = 0; m < of.count; ++m) this->add_teacher(index, m, p);
      Held<S, N, V> s;
      this->load(call.sides[kStudent].dtype, s);
      double logits = 0;
      if (call.smooths())
        logits = part.template sum_of_logits<S>(call.sides[kStudent].dtype, row.start.phase);
      this->fetch_teacher(index + 1, 0);
      RowState<float> own = sums(s, es, p);
      own.logits = logits;
      part.send(shared, own, index);
      queue.look_ahead(index + 2);
      collect(row, index);
      __syncthreads();
      if (part.has_gradient()) gradient.write(row, factors(), es, p);
    }
    if (shared.counted < call.rows)
      queue.over_ignored_rows(
          [&](uint32_t row) { part.template write_ignored<S>(row, queue.starts.student(row)); });
  }
};

template <class D, bool kIsCluster, class S, int V>
__global__ void __launch_bounds__(kMostThreads, 1)
    soft_target_teachers_long_rows_kernel(const __grid_constant__ MeanCall of,
                                          const __grid_constant__ Share share,
                                          const __grid_constant__ Tickets tickets) {
  if constexpr (kIsCluster && !kHasClusters) return;
  const Call& call = of.call;
  if (is_there<float>(call)) return;
  using Rows = TeachersRows<D, kIsCluster, S, V>;
  TeachersShared& shared = shared_memory<TeachersShared>();
  const typename Rows::RowPart part{call, share, after<char>(shared)};
  const Rows rows{{of, shared, part}};
  const LongLosses<typename Rows::RowPart> losses{part, shared};
  rows.fill_absent();
  losses.open(rows.queue);
  if constexpr (kIsCluster) {
    shared.parts.open();
    shared.sums.open();
  }
  rows.run();
  losses.close(tickets);
}

template <class D, bool kIsCluster, class S>
bool launch_with(const MeanCall& of, const Blocks& blocks, const Scratch& scratch,
                 const Stream& stream) {
  constexpr int V = kFewVectors<S>;
  return launch_long<typename TeachersRows<D, kIsCluster, S, V>::RowPart, TeachersShared>(
      soft_target_teachers_long_rows_kernel<D, kIsCluster, S, V>, of, of.call, blocks, scratch,
      stream);
}

}  // namespace

bool launch_teachers_long_rows(const MeanCall& of, const Scratch& scratch, const Stream& stream) {
  if (of.call.rate * float(kLogitScale) < FLT_MIN) return false;
  return with_type_of(of, [&](auto divergence, auto* storage) {
    using D = decltype(divergence);
    using S = std::remove_pointer_t<decltype(storage)>;
    for (const Blocks& blocks : kTeams)
      if (blocks.cluster > 1 ? launch_with<D, true, S>(of, blocks, scratch, stream)
                             : launch_with<D, false, S>(of, blocks, scratch, stream))
        return true;
    return false;
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
