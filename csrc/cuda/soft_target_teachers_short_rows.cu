// Short rows of a student and several teachers, a warp's each: it reads one tensor's row after the
// other, and keeps in registers what the teachers amount to. The next row, of whichever tensor, is
// on its way from memory to shared memory meanwhile.
#include "soft_target_mean.h"
#include "soft_target_short_part.h"

namespace fastkd::cuda {
namespace logits {
namespace {

// Classes of a vector: 16 bytes of half precision, and twice as many of float32.
constexpr int N = kVector<Any, Any>;
constexpr int kPlanes = planes_of<Any>(N);
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

  // One stage for logits, and one for exponentials at temperature 1.
  __device__ __forceinline__ Stage of_logits(int v) const {
    return part.stage(0).plane(v * kPlanes);
  }
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

  __device__ __forceinline__ void fetch(const Tensor& from, int64_t at, int phase) const {
    const bool by_vectors = is_aligned(from, at, phase);
    part.over_vectors_rolled(phase, [&](int v, int i) {
      if (by_vectors && part.is_whole(i))
        of_logits(v).template fetch_whole<Any, N>(from, at, i);
      else
        of_logits(v).template fetch_elements<Any, N>(from, at, i, part.classes);
    });
    __pipeline_commit();
  }
  __device__ __forceinline__ void fetch_teacher(uint32_t row, int m) const {
    fetch(of.teachers[m].tensor, start_of_teacher(of, row, m), start_of(row).phase);
  }
  // Waits for the row that was sent for last; what this thread does not have is excluded classes.
  __device__ __forceinline__ void load(DType dtype, Vectors& to) const {
    __pipeline_wait_prior(0);
    with_storage(dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        int i;
        if (part.place_of(v, 0, i)) {
          of_logits(v).template load_to<E, N>(dtype, to + v * N);
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
    return over_lanes_max<kWarp>(maximum);
  }
  // Adds a teacher's probabilities, and sends for what follows it.
  __device__ __forceinline__ void add_teacher(uint32_t row, int m, Vectors& p) const {
    Vectors t;
    load(of.teachers[m].tensor.dtype, t);
    if (m + 1 < of.count) {
      fetch_teacher(row, m + 1);
    } else {
      const auto start = start_of(row);
      fetch(call.sides[kStudent], start.at[kStudent], start.phase);
    }
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
    if (rates.has_hard) own.hard = part.exp_hard(s, s_shift, rates, part.stage(1));
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
    if (call.sides[kToStudent].data != nullptr) {
      const auto by = factors_of<D>(call, row, state, rates, shared.weights, label);
      part.template write_gradient<D, Any>(start, s, p, part.stage(1), by, label);
    }
    // Here, where no exponential waits in a register.
    if (part.leads) {
      const double logit = logit_of<Any>(call, start.at[kStudent], label);
      write_losses<float>(call, row, losses_of<D>(state, rates, call, label, logit),
                          shared.totals[part.warp]);
    }
  }
};

template <class D, int V>
__global__ void __launch_bounds__(kShortThreads, blocks_together(V* N))
    soft_target_teachers_short_rows_kernel(const __grid_constant__ MeanCall of, const Share share,
                                           const __grid_constant__ Tickets tickets) {
  const Call& call = of.call;
  if (call.in_place && *static_cast<const float*>(call.grad_output) == 1) return;
  ShortShared& shared = shared_memory<ShortShared>();
  const Rows<D, V> rows{
      of, call, shared, {call, share, after<char>(shared)}, MeanRates<float>(of), call.smooths()};
  const auto& part = rows.part;
  part.open(shared);
  uint32_t row = rows.find(part.first_row());
  if (row < call.rows) rows.fetch_teacher(row, 0);
  while (row < call.rows) {
    typename Rows<D, V>::Vectors p, s;  // logits, and then their exponentials
#pragma unroll
    for (float& x : p) x = -0.0f;
#pragma unroll 1
    for (int m = 0; m < of.count; ++m) rows.add_teacher(row, m, p);
    rows.load(call.sides[kStudent].dtype, s);
    const uint32_t next = rows.find(part.row_after(row));
    if (next < call.rows) rows.fetch_teacher(next, 0);
    const RowState<float> state = rows.sums(row, s, p);
    rows.emit(row, state, s, p);
    row = next;
  }
  part.close(shared, tickets);
}

template <class D, int V>
bool launch_with(const MeanCall& of, const Scratch& scratch, const Stream& stream) {
  return launch_short<ShortShared, typename Rows<D, V>::RowPart>(
      soft_target_teachers_short_rows_kernel<D, V>, of, of.call, scratch, stream);
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
