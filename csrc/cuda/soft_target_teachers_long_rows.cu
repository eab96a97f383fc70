// Long rows of a student and several teachers, a block's or a cluster's each. A thread reads its
// classes of one tensor after the other, and keeps in registers what the teachers amount to. The
// next row, of whichever tensor, is on its way from memory to shared memory meanwhile.
//
// Every warp sends the sum of a teacher's exponentials to every block, and puts all of them
// together itself. The first warp of each block puts the student's sums together.
#include "soft_target_long_gradient.h"
#include "soft_target_long_losses.h"
#include "soft_target_long_queue.h"
#include "soft_target_mean.h"

namespace fastkd::cuda {
namespace logits {
namespace {

// A warp's part of a teacher's row: the sum of 2^(rate · logit − origin), where the origin is
// rate · maximum less `rest`.
struct alignas(16) PartialSum {
  float maximum = -INFINITY, sum = 0, rest = 0;
};

struct TeachersShared : LongShared {
  ClusterExchange<PartialSum, kMostCluster * kMostWarps> sums;
  int64_t starts[kQueue][kMostTeachers];  // of each queued row's teachers
};

template <int N>
struct TeachersStarts {
  const MeanCall& of;
  TeachersShared& shared;

  __device__ __forceinline__ Start<> student(uint32_t row) const {
    Start<> start;
    locate(of.call, row, start.at);
    start.phase = phase_of<N>(of.call, start.at[kStudent]);
    start.is_aligned = is_aligned(of.call.sides[kToStudent], start.at[kToStudent], start.phase);
    return start;
  }
  // A lane has some of the teachers.
  __device__ __forceinline__ void find(uint32_t row, int place, Start<>& to) const {
    const int lane = threadIdx.x % kWarp;
    for (int m = lane; m < of.count; m += kWarp)
      shared.starts[place][m] = start_of_teacher(of, row, m);
    if (lane == 0) to = student(row);
  }
};

template <class D, bool kIsCluster, class S, int V>
struct TeachersRows {
  static constexpr int N = kVector<S, S>;
  static constexpr bool kIsAny = std::is_same_v<S, Any>;
  using RowPart = LongPart<kIsCluster, N, V, planes_of<S>(N)>;
  using Classes = float[V * N];

  const MeanCall& of;
  TeachersShared& shared;
  const RowPart& part;
  const Call& call = of.call;
  const Share& share = part.share;
  const Queue<S, TeachersStarts<N>> queue{call, share, shared, {of, shared}};
  const LongLosses<RowPart> losses{part, shared};
  const MeanRates<float> rates = MeanRates<float>(of);
  const int warp = part.warp, lane = part.lane, warps = part.warps;

  __device__ __forceinline__ void fetch(const Tensor& from, int64_t at, int phase) const {
    const bool by_vectors = is_aligned(from, at, phase);
    if (by_vectors && part.is_even())
      fetch_even(from, at);
    else
      part.over_vectors_rolled(phase, [&](int v, int i) {
        if (by_vectors && i >= 0 && i + N <= int(call.classes))
          part.stage(v).template fetch_whole<S, N>(from, at, i);
        else
          part.stage(v).template fetch_elements<S, N>(from, at, i, int(call.classes));
      });
    __pipeline_commit();
  }
  __device__ __forceinline__ void fetch_even(const Tensor& from, int64_t at) const {
    if constexpr (kIsAny) {
      part.over_vectors_rolled(
          0, [&](int v, int i) { part.stage(v).template fetch_whole<S, N>(from, at, i); });
    } else {
      const S* data =
          reinterpret_cast<const S*>(from.data) + at + (part.first_vector() + part.thread) * N;
      char* to = part.stage(0).data;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (part.has(v)) __pipeline_memcpy_async(to, data, kAccess);
        to += part.threads * kAccess;
        data += part.threads * N;
      }
    }
  }
  __device__ __forceinline__ void fetch_teacher(int index, int m) const {
    const QueuedRow& row = queue.row(index);
    if (row.row < call.rows)
      fetch(of.teachers[m].tensor, shared.starts[index % kQueue][m], row.start.phase);
  }
  // What has no vector in any row is excluded classes for good, where one dtype lies in its place.
  __device__ __forceinline__ void fill_absent() const {
    for (int v = 0; v < V && !kIsAny; ++v)
      if (!part.has(v)) part.stage(v).template fetch_elements<S, N>(call.sides[kStudent], 0, 0, 0);
  }
  // Waits for the row that was sent for last.
  __device__ __forceinline__ void load(DType dtype, Held<S, N, V>& to) const {
    __pipeline_wait_prior(0);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to.load(v, part.stage(v), dtype);
      if constexpr (kIsAny)
        if (!part.has(v)) to.exclude(v);
    }
  }
  // log2(e) / T, of logits as they are.
  __device__ __forceinline__ float rate() const {
    return rates.at_temperature * float(kLogitScale);
  }
  // Whether one instruction makes the exponents of all the warp's classes: none is excluded, and
  // no exponent is far from 0.
  __device__ __forceinline__ bool are_near(const Held<S, N, V>& x, float largest) const {
    constexpr float kMost = 0x1p22f;
    float smallest = largest;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (part.has(v)) smallest = fminf(smallest, x.smallest(v));
    const float farthest = fmaxf(fabsf(largest), fabsf(smallest));
    return __all_sync(kAllLanes, farthest <= FLT_MAX && farthest * rate() <= kMost);
  }
  // The exponentials of a teacher's classes.
  __device__ __forceinline__ PartialSum exponentials(const Held<S, N, V>& t, Classes& et) const {
    PartialSum own;
    own.maximum = warp_max(t.largest());
    if (are_near(t, own.maximum)) {
      const float origin = product(own.maximum, rate());
      own.rest = fmaf(own.maximum, rate(), -origin);
      of_each(t, et, [&](float x) { return exp2_of(fmaf(x, rate(), -origin)); });
    } else {
      const float top = shift(own.maximum);
      of_each(t, et, [&](float x) { return rates.of_teacher(shifted(x, top)); });
    }
#pragma unroll
    for (float e : et) own.sum += e;
    over_lanes_sum<kWarp>(own.sum);
    return own;
  }
  template <class F>
  __device__ __forceinline__ static void of_each(const Held<S, N, V>& held, Classes& to,
                                                 const F& f) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float x[N];
      held.widen_to(v, x);
#pragma unroll
      for (int k = 0; k < N; ++k) to[v * N + k] = f(x[k]);
    }
  }
  // What brings a part's exponentials to the maximum of all.
  __device__ __forceinline__ float moved(const PartialSum& from, float to) const {
    return from.maximum == -INFINITY
               ? 0
               : exp2_of(fmaf(shifted(from.maximum, shift(to)), rates.at_temperature, -from.rest));
  }
  // The sum of all warps' parts, in every thread; `step` counts such calls.
  __device__ __forceinline__ PartialSum merged(const PartialSum& own, int step) const {
    const int all = warps * share.blocks;
    const PartialSum* parts = shared.sums.messages[step % 2];
    if constexpr (kIsCluster) {
      if (part.thread == 0) shared.sums.expect(unsigned(all), step);
      if (lane < share.blocks)
        shared.sums.send(own, unsigned(part.rank() * warps + warp), unsigned(lane), step);
      parts = shared.sums.receive(step);
    } else {
      if (lane == 0) shared.sums.messages[step % 2][warp] = own;
      __syncthreads();
    }
    PartialSum found;
#pragma unroll 1
    for (int i = lane; i < all; i += kWarp) found.maximum = fmaxf(found.maximum, parts[i].maximum);
    found.maximum = warp_max(found.maximum);
#pragma unroll 1
    for (int i = lane; i < all; i += kWarp)
      found.sum += parts[i].sum * moved(parts[i], found.maximum);
    over_lanes_sum<kWarp>(found.sum);
    return found;
  }
  // Adds a teacher's probabilities, and sends for what follows it.
  __device__ __forceinline__ void add_teacher(int index, int m, Classes& p) const {
    Held<S, N, V> t;
    load(of.teachers[m].tensor.dtype, t);
    const QueuedRow& row = queue.row(index);
    if (m + 1 < of.count)
      fetch_teacher(index, m + 1);
    else
      fetch(call.sides[kStudent], row.start.at[kStudent], row.start.phase);
    Classes et;
    const PartialSum own = exponentials(t, et), all = merged(own, index * of.count + m);
    const float by = float(of.teachers[m].weight) / all.sum * moved(own, all.maximum);
#pragma unroll
    for (int j = 0; j < V * N; ++j) p[j] = fmaf(et[j], by, p[j]);
  }

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

  // Sends a warp's state to all blocks, whose first warps put all of them together, and the factors
  // of the row with them; `index` counts such calls.
  __device__ __forceinline__ void send(const RowState<float>& own, int index) const {
    if constexpr (kIsCluster) {
      if (part.thread == 0) shared.parts.expect(unsigned(warps * share.blocks), index);
      if (lane < share.blocks)
        shared.parts.send(own, unsigned(part.rank() * warps + warp), unsigned(lane), index);
    } else {
      if (lane == 0) shared.parts.messages[0][warp] = own;
      __syncthreads();
    }
  }
  __device__ __forceinline__ void collect(const QueuedRow& row, int index) const {
    if (warp != 0) return;
    const int all = warps * share.blocks;
    const RowState<float>* const parts =
        kIsCluster ? shared.parts.receive(index) : shared.parts.messages[0];
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
    shared.factors = factors_of<D>(call, row.row, state, rates, shared.weights, row.label);
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
    fetch_teacher(0, 0);
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
      for (int m = 0; m < of.count; ++m) add_teacher(index, m, p);
      Held<S, N, V> s;
      load(call.sides[kStudent].dtype, s);
      double logits = 0;
      if (call.smooths())
        logits = part.template sum_of_logits<S>(call.sides[kStudent].dtype, row.start.phase);
      fetch_teacher(index + 1, 0);
      RowState<float> own = sums(s, es, p);
      own.logits = logits;
      send(own, index);
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
  if (call.in_place && *static_cast<const float*>(call.grad_output) == 1) return;
  using Rows = TeachersRows<D, kIsCluster, S, V>;
  TeachersShared& shared = shared_memory<TeachersShared>();
  const typename Rows::RowPart part{call, share, after<char>(shared)};
  const Rows rows{of, shared, part};
  rows.fill_absent();
  rows.losses.open(rows.queue);
  if constexpr (kIsCluster) {
    shared.parts.open();
    shared.sums.open();
  }
  rows.run();
  rows.losses.close(tickets);
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
