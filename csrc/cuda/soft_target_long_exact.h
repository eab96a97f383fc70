// A long row once more, from memory and in units that serve any row. It is rare, and slow.
#pragma once

#include "soft_target_long_pair.h"

namespace fastkd::cuda::logits {

template <class D, bool kIsCluster, class S, class T, int V>
struct ExactRow {
  using RowPair = Pair<kIsCluster, S, T, V>;
  static constexpr int N = RowPair::N;

  const RowPair& part;
  const LongShared& shared;
  const Call& call = part.call;

  template <class F>
  __device__ __forceinline__ void over_classes(int phase, const F& f) const {
    part.over_vectors_rolled(phase, [&](int, int first) {
#pragma unroll 1
      for (int i = max(first, 0); i < min(first + N, int(call.classes)); ++i) f(i);
    });
  }
  template <class E>
  __device__ __forceinline__ float logit(Side side, const Start<>& start, int i) const {
    const Tensor& from = call.sides[side];
    return float(elements_of<E>(from, start.at[side]).load(i * from.class_stride));
  }
  // The warp's state.
  __device__ __forceinline__ RowState<float> sums(const Start<>& start) const {
    const Rates<float> rates(call);
    RowState<float> own;
    over_classes(start.phase, [&](int i) {
      const float s[] = {logit<S>(kStudent, start, i)}, t[] = {logit<T>(kTeacher, start, i)};
      add<D>(own, s, t, 0, 1, rates, call.smooths());
    });
    MergeLanes<D, float>{rates, call.smooths()}.template over<kWarp>(own);
    return own;
  }
  // From the block's factors.
  __device__ __forceinline__ void write_gradient(const QueuedRow& row) const {
    const Rates<float> rates(call);
    const RowFactors<float> by = shared.factors;
    const float s_shift = shift(shared.row.student_max), t_shift = shift(shared.row.teacher_max);
    const Tensor& to = call.sides[kToStudent];
    over_classes(row.start.phase, [&](int i) {
      const float x = shifted(logit<S>(kStudent, row.start, i), s_shift);
      const float y = shifted(logit<T>(kTeacher, row.start, i), t_shift);
      elements_of<S>(to, row.start.at[kToStudent])
          .store(i * to.class_stride, by.template of_logits<D>(x, y, rates, i == row.label));
    });
  }
};

}  // namespace fastkd::cuda::logits
