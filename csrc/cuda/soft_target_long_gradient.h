// The gradient of a long row, from the exponentials that a thread holds in registers.
#pragma once

#include "soft_target_long_part.h"

namespace fastkd::cuda::logits {

template <class D, class S, class RowPart>
struct HeldGradient {
  static constexpr int N = RowPart::N, V = RowPart::V;
  using Classes = float[V * N];

  const RowPart& part;
  const Call& call = part.call;

  // The gradient of the thread's vectors, from what was kept of their classes, by factors that are
  // relative to the same maxima.
  __device__ __forceinline__ void write(const QueuedRow& row, const RowFactors<float>& by,
                                        const Classes& es, const Classes& kept) const {
    int64_t at = row.start.at[kToStudent] + (part.first_vector() + part.thread) * N;
    if (part.is_even() && by.soft && !by.has_hard) {
      // Constants, which leave no branch in the loop.
      Factors<float> plain = by;
      plain.soft = true;
      plain.has_hard = false;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float g[N];
#pragma unroll
        for (int k = 0; k < N; ++k) g[k] = plain.gradient<D>(es[v * N + k], kept[v * N + k], 0.0f);
        if (part.has(v)) write_whole(g, at + v * part.threads * N);
      }
    } else {
      part.over_vectors(row.start.phase, [&](int v, int i) {
        float g[N] = {};
        if (by.has_hard) part.of_hard(v).template load_to<float, N>(DType::f32, g);
#pragma unroll
        for (int k = 0; k < N; ++k)
          g[k] = by.any ? by.template gradient<D>(es[v * N + k], kept[v * N + k], g[k]) : 0;
        store_vector<S>(g, call, kToStudent, row.start, i);
      });
    }
    if (row.label >= 0 && by.any) write_label(row, by, es, kept);
  }
  __device__ __forceinline__ void write_whole(const float (&g)[N], int64_t at) const {
    const Tensor& to = call.sides[kToStudent];
    as_storage<S>(to.dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
      store(narrow_all<E>(g), reinterpret_cast<E*>(to.data) + at);
    });
  }
  // Writes the gradient of the label's class once more, if this thread has it.
  __device__ __forceinline__ void write_label(const QueuedRow& row, const RowFactors<float>& by,
                                              const Classes& es, const Classes& kept) const {
    part.over_vectors(row.start.phase, [&](int v, int i) {
      const int at = int(row.label) - i;
      if (at < 0 || at >= N) return;
      float e = 0, of_teacher = 0, eh = 0;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (k != at) continue;
        e = es[v * N + k];
        of_teacher = kept[v * N + k];
      }
      if (by.has_hard) eh = part.of_hard(v).template get<float>(at);
      elements_of<S>(call.sides[kToStudent], row.start.at[kToStudent])
          .store(row.label * call.sides[kToStudent].class_stride,
                 by.template of_kept<D>(e, of_teacher, eh, true));
    });
  }
};

}  // namespace fastkd::cuda::logits
