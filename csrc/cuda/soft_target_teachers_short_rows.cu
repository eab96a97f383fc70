// Short rows of a student and several teachers, a warp's each: it reads one tensor's row after the
// other, and keeps in registers what the teachers amount to. The next rows, of whichever tensors,
// are on their way from memory to shared memory meanwhile.
#include "packed.h"
#include "soft_target_mean.h"
#include "soft_target_short_part.h"

namespace fastkd::cuda {
namespace logits {
namespace {

// Classes of a vector: 16 bytes of half precision, and twice as many of float32.
constexpr int N = kVector<Any, Any>;
constexpr int kPlanes = planes_of<Any>(N);
// Rows on their way at a time: with three teachers, all of the first row's tensors.
constexpr int kDepth = 4;
constexpr int kOfHard = kDepth;  // the stage of exponentials at temperature 1

// A row of one tensor: a teacher's, or after those the student's.
struct Place {
  uint32_t row;
  int tensor;
};

// A thread's part in a row: what it loads, finds and writes of V vectors.
template <class D, int V>
struct Rows {
  using RowPart = ShortPart<N, V, kPlanes>;
  using Vectors = typename RowPart::Vectors;

  const MeanCall& of;
  const Call& call;
  ShortShared& shared;
  const RowPart part;
  const MeanRates<float> rates;
  const bool with_logits;

  __device__ __forceinline__ Start<> start_of(uint32_t row) const {
    Start<> start;
    locate(call, row, start.at);
    start.phase = phase_of<N>(call, start.at[kStudent]);
    start.is_aligned = is_aligned(call.sides[kToStudent], start.at[kToStudent], start.phase);
    return start;
  }
  __device__ __forceinline__ uint32_t find(uint32_t row) const {
    return part.template find<Any>(row, [&](uint32_t r) { return start_of(r); });
  }

  __device__ __forceinline__ const Tensor& tensor(int m) const {
    return m < of.count ? of.teachers[m].tensor : call.sides[kStudent];
  }
  __device__ __forceinline__ void fetch(const Place& place, const Stage& to) const {
    const Start<> start = start_of(place.row);
    const Tensor& from = tensor(place.tensor);
    const int64_t at = place.tensor < of.count ? start_of_teacher(of, place.row, place.tensor)
                                               : start.at[kStudent];
    const bool by_vectors = is_aligned(from, at, start.phase);
    part.over_vectors_rolled(start.phase, [&](int v, int i) {
      if (by_vectors && part.is_whole(i))
        to.plane(v * kPlanes).template fetch_whole<Any, N>(from, at, i);
      else
        to.plane(v * kPlanes).template fetch_elements<Any, N>(from, at, i, part.classes);
    });
  }
  // Sends for a row, if there is one, and finds the one after it.
  __device__ __forceinline__ void send_for(Place& next, const Stage& to) const {
    if (next.row < call.rows) {
      fetch(next, to);
      next = next.tensor < of.count ? Place{next.row, next.tensor + 1}
                                    : Place{find(part.row_after(next.row)), 0};
    }
    __pipeline_commit();
  }
  // Waits for the row that was sent for first, and sends for another in its place. What this thread
  // does not have is excluded classes. `count` is that of such calls.
  __device__ __forceinline__ void load(int m, int& count, Place& next, Vectors& to) const {
    __pipeline_wait_prior(kDepth - 1);
    const Stage from = part.stage(count++ % kDepth);
    copy(from, tensor(m).dtype, to);
    send_for(next, from);
  }
  __device__ __forceinline__ void copy(const Stage& from, DType dtype, Vectors& to) const {
    with_storage(dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        int i;
        if (part.place_of(v, 0, i)) {
          from.plane(v * kPlanes).template load_to<E, N>(dtype, to + v * N);
        } else {
#pragma unroll
          for (int k = 0; k < N; ++k) to[v * N + k] = -INFINITY;
        }
      }
    });
  }

  __device__ __forceinline__ static float max_of(const Vectors& x) {
    float maximum = -INFINITY;
#pragma unroll
    for (float one : x) maximum = fmaxf(maximum, one);
    return warp_max(maximum);
  }
  // Adds a teacher's probabilities.
  __device__ __forceinline__ void add_teacher(int m, Vectors& t, Vectors& p) const {
    const float t_shift = shift(max_of(t));
    float sum = 0;
#pragma unroll
    for (float& x : t) {
      x = rates.of_teacher(shifted(x, t_shift));
      sum += x;
    }
    over_lanes_sum<kWarp>(sum);
    const float by = float(of.teachers[m].weight) / sum;
#pragma unroll
    for (int j = 0; j < V * N; ++j) p[j] += t[j] * by;
  }

  // The row's state, whose logits become their exponentials.
  __device__ __forceinline__ RowState<float> sums(uint32_t row, Vectors& s, Vectors& p) const {
    RowState<float> own;
    own.student_max = max_of(s);
    const float s_shift = shift(own.student_max);
    if (with_logits) own.logits = part.sum_of(s, start_of(row).phase);
    if (rates.has_hard) own.hard = part.exp_hard(s, s_shift, rates, part.stage(kOfHard));
#pragma unroll
    for (int j = 0; j < V * N; ++j) {
      const float x = shifted(s[j], s_shift);
      s[j] = rates.exp_soft(x);
      own.student += s[j];
      p[j] = add_mean<D>(own, s[j], p[j], x, rates);
    }
    add_over_lanes<kWarp>(own, rates.has_hard, with_logits);
    return own;
  }
  __device__ __forceinline__ void emit(uint32_t row, const RowState<float>& state, const Vectors& s,
                                       const Vectors& p) const {
    const auto start = start_of(row);
    const int label = int(label_of(call, row));
    // Before the gradient, which may take the logits' place.
    const double logit = part.leads ? logit_of<Any>(call, start.at[kStudent], label) : 0;
    __syncwarp();
    if (call.sides[kToStudent].data != nullptr) {
      const auto by = factors_of<D>(call, state, rates,
                                    shared.weights.times(grad_output_of<float>(call, row)), label);
      part.template write_gradient<D, Any>(start, s, p, part.stage(kOfHard), by, label);
    }
    // Here, where no exponential waits in a register.
    if (part.leads)
      write_losses<float>(call, row, losses_of<D>(state, rates, call, label, logit),
                          shared.totals[part.warp]);
  }
};

template <class D, int V>
__global__ void __launch_bounds__(kShortThreads, blocks_together(V* N))
    soft_target_teachers_short_rows_kernel(const __grid_constant__ MeanCall of, const Share share,
                                           const __grid_constant__ Tickets tickets) {
  const Call& call = of.call;
  if (is_there<float>(call)) return;
  ShortShared& shared = shared_memory<ShortShared>();
  const Rows<D, V> rows{
      of, call, shared, {call, share, after<char>(shared)}, MeanRates<float>(of), call.smooths()};
  const auto& part = rows.part;
  part.open(shared);
  Place next{rows.find(part.first_row()), 0};
  uint32_t row = next.row;
  int count = 0;
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) rows.send_for(next, part.stage(i));
  while (row < call.rows) {
    typename Rows<D, V>::Vectors p, s;  // logits, and then their exponentials
#pragma unroll
    for (float& x : p) x = -0.0f;
#pragma unroll 1
    for (int m = 0; m < of.count; ++m) {
      rows.load(m, count, next, s);
      rows.add_teacher(m, s, p);
    }
    rows.load(of.count, count, next, s);
    const RowState<float> state = rows.sums(row, s, p);
    rows.emit(row, state, s, p);
    do row = part.row_after(row);
    while (row < call.rows && ignores(call, row));
  }
  part.close(shared, tickets);
}

template <class D, int V>
bool launch_with(const MeanCall& of, const Scratch& scratch, const Stream& stream) {
  return launch_short<ShortShared, typename Rows<D, V>::RowPart>(
      soft_target_teachers_short_rows_kernel<D, V>, of, of.call,
      kDepth + (of.call.has_hard ? 1 : 0), scratch, stream);
}

}  // namespace

bool launch_teachers_short_rows(const MeanCall& of, const Scratch& scratch, const Stream& stream) {
  return with_divergence(of.call.divergence, [&](auto divergence) {
    using D = decltype(divergence);
    return launch_with<D, kFew / N>(of, scratch, stream) ||
           launch_with<D, kHeld / N>(of, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
