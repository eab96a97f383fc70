// Rows of a student and several teachers, of any length and strides, in two passes: the normalisers
// of all tensors, and then the loss and the gradient.
#include "soft_target_passes.h"

namespace fastkd::cuda {
namespace logits {
namespace {

template <class D, class A, bool kIsColumns>
struct Passes : RowPasses<A, kIsColumns> {
  using Base = RowPasses<A, kIsColumns>;
  using Base::call, Base::leads, Base::N, Base::of, Base::shared, Base::with_logits;

  const MeanRates<A> rates;
  const Weights<A> weights;
  const bool writes;

  __device__ __forceinline__ Passes(const MeanCall& of, PassesShared<A>& shared, int64_t vectors,
                                    double counted)
      : Base(of, shared, vectors),
        rates(of),
        weights(of.call, divisor_of(of.call, counted), 1),
        writes(of.call.sides[kToStudent].data != nullptr) {}

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
        this->over_vectors(
            phase, [&](int64_t i) { store_vector<Any>(zeros, call, kToStudent, start, i); });
      return;
    }
    const int64_t label = label_of(call, row);
    // Before the barriers behind which the gradient may take the logits' place.
    const double logit = leads ? logit_of<Any>(call, start.at[kStudent], label) : 0;
    this->find_normalisers(row, phase, rates);
    // The student's sums are behind a barrier that those writes are before.
    RowState<A> state =
        this->template sums_of<true>(this->reader(call.sides[kStudent], start.at[kStudent], phase),
                                     phase, rates, MergeMeanLanes<D, A>{rates, with_logits});
    const A s_shift = shift(state.student_max);
    const auto by =
        factors_of<D>(call, state, rates, weights.times(grad_output_of<A>(call, row)), label);
    double sums[2] = {};  // of the target's mass and of the divergence's terms
    this->over_vectors(phase, [&](int64_t i) {
      A p[N], s[N];
      this->target(row, phase, i, rates, p);
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
  auto& shared = shared_memory<PassesShared<A>>();
  const double counted = counted_rows(call, shared.losses);
  const Passes<D, A, kIsColumns> passes(of, shared, vectors, counted);
  Losses total;
  over_rows<kIsColumns>(call, [&](uint32_t row) { passes.run(row, total); });
  write_loss<A>(call, kIsColumns ? over_warp(total) : total, counted, tickets, shared.losses);
}

template <class D, class A, bool kIsColumns>
void launch_typed(const MeanCall& of, const Scratch& scratch, const Stream& stream) {
  launch_over_rows<A, kIsColumns>(soft_target_passes_kernel<D, A, kIsColumns>, of, of.call,
                                  of.count * sizeof(Normaliser<A>), scratch, stream);
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
