// Rows of a student and several teachers, of any length and strides, in two passes: the normalisers
// of all tensors, and then the loss and the gradient.
#include "soft_target_forms.h"
#include "soft_target_mean.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kColumnThreads = 128;

// What becomes of a teacher's scaled logits in a row: exp2((t - shift) · rate) · by.
template <class A>
struct Normaliser {
  A shift, by;
};

template <class A>
struct Shared : BlockShared<A> {
  double sums[kBlockRowThreads / kWarp][2];
};

// N classes. Those outside of the row are excluded ones.
template <class A, int N>
__device__ __forceinline__ void read(const Tensor& from, int64_t at, int64_t i, int64_t classes,
                                     bool is_aligned, A (&to)[N]) {
  if (is_aligned) return load_vector<A, Any>(from, at, i, classes, true, to);
  const auto of_storage = [&](auto* storage) {
    using E = std::remove_pointer_t<decltype(storage)>;
    const E* const data = reinterpret_cast<const E*>(from.data) + at;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      to[k] = A(-INFINITY);
      if (i + k < 0 || i + k >= classes) continue;
      const E x = data[(i + k) * from.class_stride];
      if constexpr (std::is_same_v<E, double>)
        to[k] = A(x);
      else
        to[k] = A(widen(x));
    }
  };
  if constexpr (sizeof(A) == sizeof(double))
    if (from.dtype == DType::f64) return of_storage(static_cast<double*>(nullptr));
  with_storage(from.dtype, of_storage);
}

// A thread's part in a row, which is a block's, or in columns a thread's.
template <class D, class A, bool kIsColumns>
struct Passes {
  static constexpr int N = kClasses<A, Any, Any>;

  const MeanCall& of;
  const Call& call;
  Shared<A>& shared;
  const int64_t vectors;
  const MeanRates<A> rates;
  const bool with_logits;
  const Weights<A> weights;
  Normaliser<A>* const normalisers = after<Normaliser<A>>(shared);
  const bool leads = kIsColumns || threadIdx.x == 0;
  const bool writes = call.sides[kToStudent].data != nullptr;

  __device__ __forceinline__ Normaliser<A>& normaliser(int m) const {
    return normalisers[kIsColumns ? m * int(blockDim.x) + int(threadIdx.x) : m];
  }

  // f(first class), for the vectors of this thread.
  template <class F>
  __device__ __forceinline__ void over_vectors(int phase, const F& f) const {
    const int64_t step = kIsColumns ? 1 : int(blockDim.x);
#pragma unroll 1
    for (int64_t v = kIsColumns ? 0 : threadIdx.x; v < vectors; v += step) f(v * N - phase);
  }

  // Maximum and sums of one tensor's row, in every thread that has a part in it.
  template <bool kIsStudent, class Merge>
  __device__ __forceinline__ RowState<A> sums_of(const Tensor& from, int64_t at, int phase,
                                                 const Merge& lanes) const {
    const bool by_vectors = is_aligned(from, at, phase);
    RowState<A> row;
    over_vectors(phase, [&](int64_t i) {
      A x[N];
      read(from, at, i, call.classes, by_vectors, x);
      A maximum = row.student_max;
#pragma unroll
      for (int k = 0; k < N; ++k) maximum = x[k] > maximum ? x[k] : maximum;
      if (maximum > row.student_max) lanes.move(row, maximum);
      // Partial sums of their own take part in fewer roundings.
      A sum = 0, hard = 0;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A below = shifted(x[k], shift(maximum));
        sum += rates.exp_soft(below);
        if (kIsStudent && rates.has_hard) hard += rates.exp_hard(below);
        if (kIsStudent && with_logits && i + k >= 0 && i + k < call.classes)
          row.logits += double(x[k] * A(kLogitScale));
      }
      row.student += sum;
      row.hard += hard;
    });
    if constexpr (!kIsColumns) merge_over_block(row, shared.of_warps, lanes);
    return row;
  }

  // p of N classes.
  __device__ __forceinline__ void target(uint32_t row, int phase, int64_t i, A (&p)[N]) const {
#pragma unroll
    for (A& x : p) x = A(-0.0);
#pragma unroll 1
    for (int m = 0; m < of.count; ++m) {
      const Tensor& teacher = of.teachers[m].tensor;
      const int64_t start = start_of_teacher(of, row, m);
      const Normaliser<A> by = normaliser(m);
      A t[N];
      read(teacher, start, i, call.classes, is_aligned(teacher, start, phase), t);
#pragma unroll
      for (int k = 0; k < N; ++k) p[k] += rates.of_teacher(shifted(t[k], by.shift)) * by.by;
    }
  }

  // One row, whose losses are added to the total.
  __device__ __forceinline__ void run(uint32_t row, Losses& total) const {
    Start<> start;
    locate(call, row, start.at);
    const int phase = start.phase = kIsColumns ? 0 : phase_of<N>(call, start.at[kStudent]);
    const bool by_vectors = is_aligned(call.sides[kStudent], start.at[kStudent], phase);
    start.is_aligned = writes && is_aligned(call.sides[kToStudent], start.at[kToStudent], phase);
    if (ignores(call, row)) {
      if (leads) write_ignored_row<A>(call, row);
      const A zeros[N] = {};
      if (writes)
        over_vectors(phase,
                     [&](int64_t i) { store_vector<Any>(zeros, call, kToStudent, start, i); });
      return;
    }
    const int64_t label = label_of(call, row);
    // Before the barriers behind which the gradient may take the logits' place.
    const double logit = leads ? logit_of<Any>(call, start.at[kStudent], label) : 0;
#pragma unroll 1
    for (int m = 0; m < of.count; ++m) {
      const RowState<A> teacher = sums_of<false>(
          of.teachers[m].tensor, start_of_teacher(of, row, m), phase, MergeTeacherLanes<A>{rates});
      if (leads)
        normaliser(m) = {shift(teacher.student_max), A(of.teachers[m].weight) / teacher.student};
    }
    // The student's sums are behind a barrier that those writes are before.
    RowState<A> state = sums_of<true>(call.sides[kStudent], start.at[kStudent], phase,
                                      MergeMeanLanes<D, A>{rates, with_logits});
    const A s_shift = shift(state.student_max);
    const auto by =
        factors_of<D>(call, state, rates, weights.times(grad_output_of<A>(call, row)), label);
    double sums[2] = {};  // of the target's mass and of the divergence's terms
    over_vectors(phase, [&](int64_t i) {
      A p[N], s[N];
      target(row, phase, i, p);
      read(call.sides[kStudent], start.at[kStudent], i, call.classes, by_vectors, s);
      RowState<A> here;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A x = shifted(s[k], s_shift);
        const A eh = rates.has_hard ? rates.exp_hard(x) : A(0), es = rates.exp_soft(x);
        const A kept = add_mean<D>(here, es, p[k], x, rates);
        s[k] = by.template of_kept<D>(es, kept, eh, i + k == label);
      }
      sums[0] += double(here.teacher);
      sums[1] += double(here.difference);
      if (writes) store_vector<Any>(s, call, kToStudent, start, i);
    });
    if constexpr (!kIsColumns) block_sums(sums, shared.sums);
    if (!leads) return;
    state.teacher = A(sums[0]);
    state.difference = A(sums[1]);
    write_losses<A>(call, row, losses_of<D>(state, rates, call, label, logit), total);
  }
};

template <class D, class A, bool kIsColumns>
__global__ void __launch_bounds__(kIsColumns ? kColumnThreads : kBlockRowThreads,
                                  kIsColumns ? 4 : 2)
    soft_target_passes_kernel(const __grid_constant__ MeanCall of, int64_t vectors,
                              const Tickets tickets) {
  const Call& call = of.call;
  if (is_there<A>(call)) return;
  Shared<A>& shared = shared_memory<Shared<A>>();
  const double counted = counted_rows(call, shared.losses);
  const Passes<D, A, kIsColumns> passes{of,
                                        call,
                                        shared,
                                        vectors,
                                        MeanRates<A>(of),
                                        call.smooths(),
                                        Weights<A>(call, divisor_of(call, counted), 1)};
  Losses total;
  const uint32_t threads = blockDim.x;
  const uint32_t first = kIsColumns ? blockIdx.x * threads + threadIdx.x : blockIdx.x;
  const uint32_t step = kIsColumns ? gridDim.x * threads : gridDim.x;
  for (uint32_t row = first; row < call.rows; row += step) {
    passes.run(row, total);
    if (call.rows - row <= step) break;
  }
  write_loss<A>(call, kIsColumns ? over_warp(total) : total, counted, tickets, shared.losses);
}

template <class D, class A, bool kIsColumns>
void launch_typed(const MeanCall& of, const Scratch& scratch, const Stream& stream) {
  constexpr auto kernel = soft_target_passes_kernel<D, A, kIsColumns>;
  constexpr int N = kClasses<A, Any, Any>;
  const Call& call = of.call;
  const int64_t vectors = kIsColumns ? (call.classes + N - 1) / N : vectors_of(call, N);
  const int threads =
      kIsColumns ? kColumnThreads
                 : int(std::min<int64_t>((vectors + kWarp - 1) / kWarp * kWarp, kBlockRowThreads));
  const int64_t at_once = kIsColumns ? threads : 1;
  Grid grid{1, threads,
            kHeader<Shared<A>> + size_t(of.count) * size_t(at_once) * sizeof(Normaliser<A>)};
  grid.blocks = std::min({(int64_t(call.rows) + at_once - 1) / at_once,
                          resident_clusters(kernel, grid, stream), kMostBlocks});
  launch(kernel, grid, stream, of, vectors, scratch.tickets(call, stream));
}

}  // namespace

void launch_passes(const MeanCall& of, bool are_columns, const Scratch& scratch,
                   const Stream& stream) {
  with_divergence(of.call.divergence, [&](auto divergence) {
    using D = decltype(divergence);
    if (of.call.is_double)
      return are_columns ? launch_typed<D, double, true>(of, scratch, stream)
                         : launch_typed<D, double, false>(of, scratch, stream);
    return are_columns ? launch_typed<D, float, true>(of, scratch, stream)
                       : launch_typed<D, float, false>(of, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
