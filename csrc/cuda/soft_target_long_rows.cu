// Long rows of a student and one teacher, a block's or a cluster's each. A thread reads its classes
// once, keeps their exponentials in registers, and writes the gradient from there, while the next
// row is on its way from memory to shared memory.
//
// Every warp sends its sums to every block of the cluster. The first warp of each block puts them
// together, while the next one looks up the row after the next: so a round has one barrier. The
// logarithms of 32 rows are a warp's, a lane each.
#include "soft_target_long_exact.h"
#include "soft_target_long_gradient.h"
#include "soft_target_long_queue.h"

namespace fastkd::cuda {
namespace logits {
namespace {

template <class D, bool kIsCluster, class S, class T, int V>
struct LongRows {
  using RowPart = Part<kIsCluster, S, T, V>;
  static constexpr int N = RowPart::N;
  using Classes = float[V * N];

  const RowPart& part;
  const Call& call = part.call;
  const Share& share = part.share;
  LongShared& shared = part.shared;
  const Queue<S, N> queue{call, share, shared};
  const Exponents rates = Exponents(call, true);
  const int warp = part.warp, lane = part.lane, warps = part.warps;

  __device__ __forceinline__ bool has_gradient() const {
    return call.sides[kToStudent].data != nullptr;
  }

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
      if (rates.has_hard) own.hard += exponentials_at_one(x, part.of_hard(v));
    }
    add_over_lanes<kWarp>(own, rates.has_hard, false);
    own.student_max = shared.own_max[warp].x;
    own.teacher_max = shared.own_max[warp].y;
    return own;
  }
  // The warp's sum of the student's logits, scaled, for label smoothing: in shared memory, where it
  // takes no registers.
  __device__ __forceinline__ void add_up_logits(int phase) const {
    double sum = 0;
    part.over_vectors_rolled(phase, [&](int v, int i) {
      float x[N];
      part.of_student(v).template load_to<S, N>(call.sides[kStudent].dtype, x);
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k >= 0 && i + k < int(call.classes)) sum += double(x[k]);
    });
    sum = warp_sum(sum * kLogitScale);
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

  // Sends a warp's state to all blocks; `step` counts such calls.
  __device__ __forceinline__ void send(const RowState<float>& own, int step) const {
    if constexpr (kIsCluster) {
      if (part.thread == 0) shared.parts.expect(unsigned(warps * share.blocks), step);
      if (lane < share.blocks)
        shared.parts.send(own, unsigned(part.rank() * warps + warp), unsigned(lane), step);
    } else {
      if (lane == 0) shared.parts.messages[0][warp] = own;
      __syncthreads();
    }
  }
  // Puts the states of all warps together, and the factors of the row with them.
  __device__ __forceinline__ void collect(const QueuedRow& row, const Exponents& units, int step,
                                          int found) const {
    if (warp != 0) return;
    const int all = warps * share.blocks;
    const RowState<float>* const parts =
        kIsCluster ? shared.parts.receive(unsigned(all), step) : shared.parts.messages[0];
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
    shared.factors = RowFactors<float>(D(), row, units.inverse(), units, shared.weights, of.label);
    if (part.rank() == 0)
      shared.found[found % kFound] = {row, of.row, of.label, of.logit, units.is_rounded};
  }

  // A row that does not count has no loss and no gradient.
  __device__ __forceinline__ void write_ignored(uint32_t row) const {
    if (part.thread == 0 && part.rank() == 0) write_ignored_row<float>(call, row);
    if (!has_gradient()) return;
    const Start<> start = start_of<N>(call, row);
    const float zeros[N] = {};
    part.over_vectors_rolled(
        start.phase, [&](int, int i) { store_vector<S>(zeros, call, kToStudent, start, i); });
  }

  // The losses of the last `count` rows that were found, of which `found` there are.
  __device__ __forceinline__ void write_losses_of(int found, int count) const {
    if (part.rank() != 0 || warp != 2 % warps || lane >= count) return;
    const FoundRow& of = shared.found[(found - count + lane) % kFound];
    const RowState<double> exact = Exponents(call, of.is_rounded).exact<D>(of.state);
    const RowState<float> kept{float(exact.student_max),
                               float(exact.teacher_max),
                               float(exact.student),
                               float(exact.teacher),
                               float(exact.hard),
                               float(exact.difference),
                               exact.logits};
    write_row(call, of.row, kept,
              losses_of<D>(exact, Rates<double>(call), call, of.label, of.logit),
              shared.totals[lane]);
  }

  // Before the first row.
  __device__ __forceinline__ void open() const {
    const double counted = counted_rows(call, shared.losses);
    const Weights<float> weights(call, divisor_of(call, counted), 1);
    if (part.thread == 0) {
      shared.counted = counted;
      shared.weights = weights;
      shared.repeats = 0;
    }
    if (part.thread < kWarp) shared.totals[part.thread] = {0, 0};
    __syncthreads();
#pragma unroll 1
    for (int index = 0; index < 2; ++index) {
      queue.look_ahead(index);
      __syncwarp();
    }
    __syncthreads();
    if constexpr (kIsCluster) shared.parts.open();
  }

  __device__ __forceinline__ void run() const {
    const ExactRow<D, kIsCluster, S, T, V> exact{part};
    const HeldGradient<D, kIsCluster, S, T, V> gradient{part};
    part.fetch(queue.row(0));
#pragma unroll 1
    for (int index = 0;; ++index) {
      const QueuedRow& row = queue.row(index);
      const bool is_end = row.row == call.rows;
      const int together = index % kWarp;
      if (together == 0 ? index > 0 : is_end)
        write_losses_of(index, together == 0 ? kWarp : together);
      if (is_end) break;
      __pipeline_wait_prior(0);
      Held<S, N, V> s, t;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        s.load(v, part.of_student(v), call.sides[kStudent].dtype);
        t.load(v, part.of_teacher(v), call.sides[kTeacher].dtype);
      }
      if (call.smooths()) add_up_logits(row.start.phase);
      part.fetch(queue.row(index + 1));
      // Before the lanes wait for one another in the sums: whoever sends lets others go on.
      const int first_step = index + shared.repeats;
      Classes es, kept;
      RowState<float> own = sums(s, t, es, kept);
      if (call.smooths()) own.logits = shared.logits[warp];
      bool is_rounded = true;
      for (;;) {
        const int step = first_step + !is_rounded;
        send(own, step);
        if (is_rounded) queue.look_ahead(index + 2);
        collect(row, Exponents(call, is_rounded), step, index);
        __syncthreads();
        if (shared.is_served) break;
        is_rounded = false;
        own = exact.sums(row.start);
      }
      if (!has_gradient()) continue;
      if (is_rounded)
        gradient.write(row, es, kept);
      else
        exact.write_gradient(row);
    }
    if (shared.counted < call.rows)
      queue.over_ignored_rows([&](uint32_t row) { write_ignored(row); });
  }

  // After the last row.
  __device__ __forceinline__ void close(const Tickets& tickets) const {
    const bool has_losses = part.rank() == 0 && warp == 2 % warps;
    write_loss<float>(call, has_losses ? over_warp(shared.totals[lane]) : Losses{}, shared.counted,
                      tickets, shared.losses);
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
  const Part<kIsCluster, S, T, V> part{call, share, shared, after<char>(shared)};
  const LongRows<D, kIsCluster, S, T, V> rows{part};
  part.fill_absent();
  rows.open();
  rows.run();
  rows.close(tickets);
}

template <class D, bool kIsCluster, class S, class T, int V>
bool launch_with(const Call& call, const Blocks& blocks, const Scratch& scratch,
                 const Stream& stream) {
  using RowPart = Part<kIsCluster, S, T, V>;
  constexpr auto kernel = soft_target_long_rows_kernel<D, kIsCluster, S, T, V>;
  const int64_t vectors = vectors_of(call, RowPart::N);
  const int64_t of_block = (vectors + blocks.cluster - 1) / blocks.cluster;
  if (of_block > int64_t(blocks.threads) * V) return false;
  const int threads = int((of_block + V * kWarp - 1) / (V * kWarp)) * kWarp;
  const int planes = V * (RowPart::kSides + (call.has_hard() ? RowPart::kHard : 0));
  Grid grid{1, threads, kHeader<LongShared> + size_t(threads) * size_t(planes * kAccess),
            blocks.cluster};
  const int64_t resident = resident_clusters(kernel, grid, stream);
  if (resident == 0) return false;
  const int64_t teams = std::min({int64_t(call.rows), resident, kMostBlocks / blocks.cluster});
  grid.blocks = teams * blocks.cluster;
  launch(kernel, grid, stream, call,
         Share{int(vectors), int(of_block), blocks.cluster, uint32_t(teams)},
         scratch.tickets(call, stream));
  return true;
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
