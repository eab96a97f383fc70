// Short rows of a student and one teacher, a warp's each: it reads a row once, keeps its
// exponentials in registers, and writes the gradient from there, while the next row is on its way
// from memory to shared memory.
#include "soft_target_short_part.h"

namespace fastkd::cuda {
namespace logits {
namespace {

struct Shared : ShortShared {
  RowState<float> rows[kShortWarps];  // of each warp's own
  RowFactors<float> factors[kShortWarps];
  double logits[kShortWarps];  // for label smoothing
};

// A stage has the vectors of both sides. The exponentials at temperature 1 take the place of what
// was computed.
template <class S, class T>
constexpr int kPlanes = planes_of<S>(kVector<S, T>) + planes_of<T>(kVector<S, T>);

// A thread's part in a row: what it loads, finds and writes of V vectors.
template <class D, class S, class T, int V>
struct Rows {
  static constexpr int N = kVector<S, T>;
  static_assert(kPlanes<S, T> * kAccess >= N * int(sizeof(float)));
  using RowPart = ShortPart<N, V, kPlanes<S, T>>;
  using Vectors = typename RowPart::Vectors;

  const Call& call;
  Shared& shared;
  const RowPart part;
  const Rates<float> rates;
  const bool with_logits;

  __device__ __forceinline__ Stage stage(int which) const {
    return part.stage(rates.has_hard ? which : 0);
  }
  __device__ __forceinline__ static Stage of_student(const Stage& stage, int v) {
    return stage.plane(v * kPlanes<S, T>);
  }
  __device__ __forceinline__ static Stage of_teacher(const Stage& stage, int v) {
    return stage.plane(v * kPlanes<S, T> + planes_of<S>(N));
  }

  __device__ __forceinline__ uint32_t find(uint32_t row) const {
    return part.template find<S>(row, [&](uint32_t r) { return start_of<N>(call, r); });
  }

  __device__ __forceinline__ void fetch_elements(const Stage& to, int v, const Start<>& start,
                                                 int i, int classes) const {
    of_student(to, v).template fetch_elements<S, N>(call.sides[kStudent], start.at[kStudent], i,
                                                    classes);
    of_teacher(to, v).template fetch_elements<T, N>(call.sides[kTeacher], start.at[kTeacher], i,
                                                    classes);
  }
  __device__ __forceinline__ void fetch(uint32_t row, const Stage& to) const {
    const auto start = start_of<N>(call, row);
    part.over_vectors_rolled(start.phase, [&](int v, int i) {
      if (!start.is_aligned || !part.is_whole(i))
        return fetch_elements(to, v, start, i, part.classes);
      of_student(to, v).template fetch_whole<S, N>(call.sides[kStudent], start.at[kStudent], i);
      of_teacher(to, v).template fetch_whole<T, N>(call.sides[kTeacher], start.at[kTeacher], i);
    });
  }
  // What has no vector in any row is excluded classes for good.
  __device__ __forceinline__ void fill_absent() const {
#pragma unroll 1
    for (int v = 0, i; v < V; ++v) {
      if (part.place_of(v, 0, i)) continue;
      for (int which = 0; which < (rates.has_hard ? 2 : 1); ++which)
        fetch_elements(part.stage(which), v, Start<>{}, 0, 0);
    }
  }
  __device__ __forceinline__ void load(const Stage& from, Vectors& s, Vectors& t) const {
    __pipeline_wait_prior(0);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      of_student(from, v).template load_to<S, N>(call.sides[kStudent].dtype, s + v * N);
      of_teacher(from, v).template load_to<T, N>(call.sides[kTeacher].dtype, t + v * N);
    }
  }

  // The warp's state of a row whose logits become their exponentials.
  __device__ __forceinline__ RowState<float> sums(uint32_t row, const Stage& at, Vectors& s,
                                                  Vectors& t) const {
    RowState<float> own;
#pragma unroll
    for (int j = 0; j < V * N; ++j) {
      own.student_max = fmaxf(own.student_max, s[j]);
      own.teacher_max = fmaxf(own.teacher_max, t[j]);
    }
    own.student_max = over_lanes_max<kWarp>(own.student_max);
    own.teacher_max = over_lanes_max<kWarp>(own.teacher_max);
    const float s_shift = shift(own.student_max), t_shift = shift(own.teacher_max);
    if (with_logits) {
      // In shared memory, where it takes no registers.
      const double logits = warp_sum(part.sum_of(s, start_of<N>(call, row).phase));
      if (part.lane == 0) shared.logits[part.warp] = logits;
    }
    if (rates.has_hard) own.hard = part.exp_hard(s, s_shift, rates, at);
#pragma unroll
    for (int j = 0; j < V * N; ++j) {
      const float x = shifted(s[j], s_shift), y = shifted(t[j], t_shift);
      s[j] = rates.exp_soft(x);
      t[j] = add_class<D>(own, x, y, s[j], rates.exp_soft(y));
    }
    add_over_lanes<kWarp>(own, rates.has_hard, false);
    if (part.lane == 0 && with_logits) own.logits = shared.logits[part.warp];
    return own;
  }
  // The row's factors, in shared memory; emit has the barrier after it.
  __device__ __forceinline__ void keep(uint32_t row, const RowState<float>& state) const {
    if (part.lane == 0) {
      shared.rows[part.warp] = state;
      shared.factors[part.warp] = RowFactors<float>(
          D(), state, call.inverse, rates, shared.weights.times(grad_output_of<float>(call, row)));
    }
  }
  __device__ __forceinline__ void emit(uint32_t row, const Stage& at, const Vectors& s,
                                       const Vectors& t) const {
    const auto start = start_of<N>(call, row);
    const int label = int(label_of(call, row));
    // Before the barrier behind which the gradient may take the logits' place.
    const float label_logit = part.leads ? float(logit_of<S>(call, start.at[kStudent], label)) : 0;
    __syncwarp();
    if (call.sides[kToStudent].data != nullptr) {
      RowFactors<float> by = shared.factors[part.warp];
      if (label == kWrongLabel) by.smoothing = NAN;
      part.template write_gradient<D, S>(start, s, t, at, by, label);
    }
    // Here, where no exponential waits in a register.
    if (part.leads) {
      const RowState<float>& state = shared.rows[part.warp];
      write_row(call, row, state, losses_of<D>(state, rates, call, label, label_logit),
                shared.totals[part.warp]);
    }
  }
};

// V vectors of a row, and of every row, are a thread's.
template <class D, class S, class T, int V>
__global__ void __launch_bounds__(kShortThreads, blocks_together(V* kVector<S, T>))
    soft_target_short_rows_kernel(const __grid_constant__ Call call, const Share share,
                                  const __grid_constant__ Tickets tickets) {
  Shared& shared = shared_memory<Shared>();
  const Rows<D, S, T, V> rows{
      call, shared, {call, share, after<char>(shared)}, Rates<float>(call), call.smooths()};
  rows.fill_absent();
  rows.part.open(shared);
  // In each round the next row is sent for, and the one before it, if there is one, computed.
  uint32_t row = call.rows, next = rows.part.first_row();
  for (int round = -1;; ++round) {
    const bool has_row = round >= 0;
    const Stage stage = rows.stage(round & 1);
    typename Rows<D, S, T, V>::Vectors s, t;  // logits, and then their exponentials
    if (has_row) rows.load(stage, s, t);
    next = rows.find(next);
    if (next < call.rows) rows.fetch(next, rows.stage((round & 1) ^ 1));
    __pipeline_commit();
    if (has_row) {
      rows.keep(row, rows.sums(row, stage, s, t));
      rows.emit(row, stage, s, t);
    }
    if (next == call.rows) break;
    row = next;
    next = rows.part.row_after(row);
  }
  rows.part.close(shared, tickets);
}

template <class D, class S, class T>
bool launch_typed(D, S*, T*, const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr int N = kVector<S, T>, held = std::is_same_v<S, Any> ? kMixedHeld : kHeld;
  const auto attempt = [&](auto v) {
    constexpr int V = decltype(v)::value;
    return launch_short<Shared, typename Rows<D, S, T, V>::RowPart>(
        soft_target_short_rows_kernel<D, S, T, V>, call, call, call.has_hard ? 2 : 1, scratch,
        stream);
  };
  return attempt(std::integral_constant<int, kFew / N>()) ||
         attempt(std::integral_constant<int, held / N>());
}

}  // namespace

bool launch_short_rows(const Call& call, const Scratch& scratch, const Stream& stream) {
  return with_types_of(call, [&](auto divergence, auto* one, auto* other) {
    return launch_typed(divergence, one, other, call, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
