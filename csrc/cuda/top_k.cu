// Teachers that kept k classes of each row: rows of any length and strides, in one pass for the
// sums of the classes that no slot lists, two over the slots, and one for the gradient.
#include "soft_target_plan.h"
#include "top_k_row.h"

namespace fastkd::cuda {
namespace logits {
namespace {

template <class A, bool kIsColumns>
struct TopK : ClassPasses<A, kIsColumns> {
  using Base = ClassPasses<A, kIsColumns>;
  using Base::call, Base::leads, Base::N, Base::shared, Base::with_logits;
  using Row = TopKRow<A>;
  using Gradient = RowGradient<A>;

  const TopKCall& top;
  const double divisor;
  const bool writes;

  __device__ __forceinline__ TopK(const TopKCall& of, PassesShared<A>& shared, int64_t vectors,
                                  double counted)
      : Base(of.call, shared, vectors),
        top(of),
        divisor(divisor_of(of.call, counted)),
        writes(of.call.sides[kToStudent].data != nullptr) {}

  // One row, whose losses are added to the total.
  __device__ __forceinline__ void run(uint32_t row, Losses& total) const {
    Row of(top, row);
    of.start.phase = kIsColumns ? 0 : phase_of<N>(call, of.start.at[kStudent]);
    of.start.is_aligned =
        writes && is_aligned(call.sides[kToStudent], of.start.at[kToStudent], of.start.phase);
    if (ignores(call, row)) return skip(of, total);
    // Before the barriers behind which the gradient may take the logits' place.
    const double logit = leads ? logit_of<Any>(call, of.start.at[kStudent], of.label) : 0;
    find_sums(of);
    double sums[2];  // Σφ, scaled, and Σψ
    add_slots(of, sums);
    Gradient gradient;
    if (leads) gradient = with_rest(of, sums);
    if (leads && !call.is_backward()) {
      Losses losses{sums[0], cross_entropy_of(of.all, of.rates, call, of.label, logit)};
      losses.divergence *= of.squared;
      write_losses<A>(call, row, losses, total);
    }
    if (writes) write_gradient(of, told(gradient));
  }

 private:
  __device__ __forceinline__ void skip(const Row& of, Losses& total) const {
    const A zeros[N] = {};
    if (leads && !call.is_backward()) write_losses<A>(call, of.row, Losses{}, total);
    if (top.log_q != nullptr) {
      over_slots(of, [&](int64_t j) { write_log_q(of, j, -INFINITY); });
      if (leads) write_log_q(of, of.slots.count, -INFINITY);
    }
    if (writes) this->over_vectors(of.start.phase, [&](int64_t i) { store(zeros, of, i); });
  }

  // f(slot), for the slots of this thread.
  template <class F>
  __device__ __forceinline__ void over_slots(const Row& of, const F& f) const {
    const int64_t step = kIsColumns ? 1 : int(blockDim.x);
#pragma unroll 1
    for (int64_t j = kIsColumns ? 0 : threadIdx.x; j < of.slots.count; j += step) f(j);
  }

  __device__ __forceinline__ double load(const Row& of, int64_t of_class) const {
    const Tensor& student = call.sides[kStudent];
    return elements_of<Any>(student, of.start.at[kStudent]).load(of_class * student.class_stride);
  }

  __device__ __forceinline__ void find_sums(Row& of) const {
    const MergeStudentLanes<A> lanes{of.rates, with_logits};
    of.soft = sums_of_slots(of, lanes);
    if (!top.listed_only || top.has_classes) {
      SlotCursor<A> cursor(of.slots);
      const auto reader = this->reader(call.sides[kStudent], of.start.at[kStudent], of.start.phase);
      of.rest =
          this->template sums_of<true>(reader, of.start.phase, of.rates, lanes, [&](int64_t i) {
            unsigned listed = 0;
            if (!top.listed_only)
              cursor.over(i, i + N, [&](int64_t, int64_t at) { listed |= 1u << int(at - i); });
            return listed;
          });
    }
    of.all = of.rest;
    if (!top.listed_only) {
      const A top_of_both =
          of.soft.student_max > of.rest.student_max ? of.soft.student_max : of.rest.student_max;
      lanes.move(of.all, top_of_both);
      lanes.move(of.soft, top_of_both);
      of.all.take(of.soft);
      of.soft = of.all;
    }
    of.log_sum = log(double(of.soft.student)) * kLogitScale;
  }

  // Of the slots' softmax; or of the classes that slots list, each once.
  __device__ __forceinline__ RowState<A> sums_of_slots(const Row& of,
                                                       const MergeStudentLanes<A>& lanes) const {
    RowState<A> found;
    over_slots(of, [&](int64_t j) {
      const int64_t at = of.slots.at(j);
      if (at < 0 || at >= call.classes || !(top.listed_only || of.slots.is_first(j))) return;
      const A x = A(load(of, at));
      if (x > found.student_max) lanes.move(found, x);
      const A below = shifted(x, shift(found.student_max));
      found.student += of.rates.exp_soft(below);
      if (of.rates.has_hard) found.hard += of.rates.exp_hard(below);
      found.logits += double(x * A(kLogitScale));
    });
    if constexpr (!kIsColumns) merge_over_block(found, shared.of_warps, lanes);
    return found;
  }

  struct Found {
    double log_q, q;
    Terms<double> terms;
  };
  // Of a slot that is no padding. A class that does not exist makes its row NaN.
  __device__ __forceinline__ Found find(const Row& of, int64_t j, int64_t at) const {
    constexpr double kNone = NAN;
    if (at >= call.classes) return {kNone, kNone, {kNone, kNone}};
    const Slot slot(double(of.slots.log_p[j]) * kLogitScale, of.log_q(load(of, at)));
    return {slot.log_q, slot.q, terms_of(call.divergence, top.beta, slot)};
  }

  __device__ __forceinline__ void write_log_q(const Row& of, int64_t j, double log_q) const {
    static_cast<A*>(top.log_q)[int64_t(of.row) * (of.slots.count + 1) + j] = A(log_q / kLogitScale);
  }

  // The terms of slots.
  __device__ __forceinline__ void add_slots(const Row& of, double (&sums)[2]) const {
    sums[0] = sums[1] = 0;
    over_slots(of, [&](int64_t j) {
      const int64_t at = of.slots.at(j);
      Found found{-INFINITY, 0, {0, 0}};
      if (at >= 0) found = find(of, j, at);
      sums[0] += found.terms.phi;
      sums[1] += found.terms.psi;
      if (top.log_q != nullptr) write_log_q(of, j, found.log_q);
    });
    if constexpr (!kIsColumns) block_sums(sums, shared.sums);
  }

  // Adds the terms of all that no slot lists.
  __device__ __forceinline__ Gradient with_rest(const Row& of, double (&sums)[2]) const {
    const double log_q = top.listed_only ? double(-INFINITY) : of.log_q_of_rest();
    if (top.log_q != nullptr) write_log_q(of, of.slots.count, log_q);
    Terms<double> rest{0, 0};
    if (top.log_rest != nullptr) {
      const double log_p = double(static_cast<const A*>(top.log_rest)[of.row]) * kLogitScale;
      rest = terms_of(call.divergence, top.beta, Slot(log_p, log_q));
    }
    sums[0] += rest.phi;
    sums[1] += rest.psi;
    return Gradient(top, of, divisor, sums[1], rest.psi, log_q);
  }

  // What one thread has found for all that have a part in the row. Behind the barrier no slot's
  // logit is read but by the thread that has the class.
  __device__ __forceinline__ const Gradient& told(const Gradient& found) const {
    if constexpr (kIsColumns) return found;
    Gradient& of_row = *after<Gradient>(shared);
    if (leads) of_row = found;
    __syncthreads();
    return of_row;
  }

  __device__ __forceinline__ void write_gradient(const Row& of, const Gradient& to) const {
    const Weights<A>& by = to.by;
    const bool reads = by.hard != 0 || (by.soft != 0 && !top.listed_only);
    const auto reader = this->reader(call.sides[kStudent], of.start.at[kStudent], of.start.phase);
    SlotCursor<A> cursor(of.slots);
    this->over_vectors(of.start.phase, [&](int64_t i) {
      A g[N];
      if (reads) reader(i, g);
#pragma unroll
      for (int k = 0; k < N; ++k)
        g[k] = reads ? to.rest.of(g[k], of.rates, by.smoothing) : to.nothing;
      if (reads || by.soft != 0)
        cursor.over(i, min(i + N, call.classes), [&](int64_t j, int64_t at) {
          const bool is_first = of.slots.is_first(j);
          A found = 0;
          if (reads && is_first) found = to.listed.of(A(load(of, at)), of.rates, by.smoothing);
          if (by.soft != 0) {
            const Found slot = find(of, j, at);
            const double off = top.listed_only ? slot.q * to.psi : 0;
            found += A(double(by.soft) * (slot.terms.psi - off));
          }
#pragma unroll
          for (int k = 0; k < N; ++k)
            if (i + k == at) g[k] = is_first ? found : g[k] + found;
        });
      if (by.hard != 0)
#pragma unroll
        for (int k = 0; k < N; ++k) g[k] -= i + k == of.label ? by.label : A(0);
      this->uncap(top.softcap, call.sides[kStudent], of.start.at[kStudent], of.start.phase, i, g);
      store(g, of, i);
    });
  }

  __device__ __forceinline__ void store(const A (&g)[N], const Row& of, int64_t i) const {
    store_vector<Any>(g, call, kToStudent, of.start, i);
  }
};

// Arithmetic in float64 takes twice the registers.
template <class A, bool kIsColumns>
__global__ void __launch_bounds__(kIsColumns ? kColumnThreads : kBlockRowThreads,
                                  (kIsColumns ? 4 : 2) / (sizeof(A) == 8 ? 2 : 1))
    top_k_kernel(const __grid_constant__ TopKCall of, int64_t vectors, const Tickets tickets) {
  const Call& call = of.call;
  auto& shared = shared_memory<PassesShared<A>>();
  const double counted = counted_rows(call, shared.losses);
  const TopK<A, kIsColumns> top_k(of, shared, vectors, counted);
  Losses total;
  over_rows<kIsColumns>(call, [&](uint32_t row) { top_k.run(row, total); });
  write_loss<A>(call, kIsColumns ? over_warp(total) : total, counted, tickets, shared.losses);
}

}  // namespace
}  // namespace logits

void top_k_forward(const Place& place, const Tensor& student, const Tensor& indices,
                   const Tensor& log_p, const Tensor& log_rest, const Tensor& labels,
                   const Tensor& loss, const Tensor& parts, const Tensor& log_q,
                   const Tensor& gradient, const Tensor& scratch, bool listed_only, int64_t,
                   const Tensor& sums, const Tensor&, const SoftTargetParameters& p,
                   const Tensors& temperatures, const Tensor& grad_output) {
  if (sums) throw std::runtime_error("top-k of a shard is not here yet");
  using namespace logits;
  const Stream stream(place);
  if (student.numel() == 0) {
    for (const fastkd::Tensor* output : {&loss, &parts, &log_q})
      clear(output->data, output->numel(), log_p.dtype, stream);
    return;
  }
  TopKCall of{};
  Call& call = of.call;
  call.is_double = log_p.dtype == DType::f64;
  const Tensors nobody;
  const Plan plan(call, nullptr, student, nobody, labels, gradient, {}, p, !temperatures.empty());
  of.beta = p.beta;
  of.softcap = p.softcap;
  of.count = indices.sizes[1];
  of.indices = indices.as<int32_t>();
  of.log_p = log_p.data;
  of.log_rest = log_rest.data;
  of.log_q = log_q.data;
  of.listed_only = listed_only;
  of.has_classes = call.labels != nullptr && p.labels_are_classes && (p.hard_weight != 0 || parts);
  call.has_hard = call.has_hard && of.has_classes;
  if (!temperatures.empty()) {
    of.temperatures = temperatures[0].data;
    of.roots = temperatures[2].data;
  }
  call.loss = loss.data;
  call.parts = parts.data;
  call.grad_output = grad_output.data;
  const Scratch own = prepare(call, scratch.data, stream);
  const auto run = [&](auto arithmetic, auto are_columns) {
    using A = decltype(arithmetic);
    launch_over_rows<A, are_columns.value>(top_k_kernel<A, are_columns.value>, of, call,
                                           are_columns.value ? 0 : sizeof(RowGradient<A>), own,
                                           stream);
  };
  if (call.is_double) return run(double{}, std::false_type{});
  const bool are_columns = plan.are_columns && of.softcap == 0;
  are_columns ? run(float{}, std::true_type{}) : run(float{}, std::false_type{});
}

void top_k_sums(const Place&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, bool, int64_t, const SoftTargetParameters&, const Tensors&) {
  throw std::runtime_error("top-k of a shard is not here yet");
}

}  // namespace fastkd::cuda
