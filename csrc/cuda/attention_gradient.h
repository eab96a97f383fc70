// A block's way through one unit of features to their gradient.
#pragma once

#include "attention_access.h"
#include "attention_power.h"

namespace fastkd::cuda::maps {

// What a position's features are multiplied with, or the one at the argmax is set to.
template <class A>
struct Slopes {
  const A* values;  // of the sample
  const int32_t* argmax;
  A factor;
  __device__ __forceinline__ A at(uint32_t position) const { return values[position] * factor; }
};

template <int N, class S, class A, class Fold>
__device__ __forceinline__ void gradient_of_columns(const Pass& pass, const Axis* axes,
                                                    uint32_t sample, uint32_t unit,
                                                    const typename Fold::Raise& power,
                                                    const Slopes<A>& slopes) {
  const Column column(pass, unit);
  if (column.periods == 0) return;
  const uint32_t planes = pass.planes;
  A of[N];
  uint32_t argmax[N];  // periods
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const uint32_t plane = planes > 1 ? (column.index * N + e) / pass.positions : 0;
    const uint32_t position = column.index * N + e - plane * pass.positions;
    of[e] = slopes.at(position);
    if constexpr (Fold::kHasArgmax) {
      const uint32_t from = uint32_t(slopes.argmax[position]) - plane, period = from / planes;
      argmax[e] = period * planes == from ? period : UINT32_MAX;
    }
  }
  int64_t start[2];
#pragma unroll
  for (int t = 0; t < 2; ++t)
    start[t] = sample * pass.sample[t] + column.first * planes * pass.channel[t] +
               (N > 1 ? int64_t(column.index) * N : offset_of(pass, axes, column.index, t));
  Cells<S> x(pass.data[0], pass.dtype, start[0]), g(pass.data[1], pass.dtype, start[1]);
  const int64_t x_step = column.groups * planes * pass.channel[0];
  const int64_t g_step = column.groups * planes * pass.channel[1];
  for (uint32_t k = column.first; k < column.periods; k += kAtOnce<N> * column.groups) {
    Raw<S, N> raw[kAtOnce<N>];
    if constexpr (!Fold::kHasArgmax) {
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce<N>; ++i) {
        if (k + i * column.groups < column.periods) raw[i].fetch(x);
        x.advance(x_step);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce<N>; ++i) {
      const uint32_t at = k + i * column.groups;
      A values[N];
      if constexpr (!Fold::kHasArgmax) raw[i].widen_to(values, x);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if constexpr (Fold::kHasArgmax)
          values[e] = at == argmax[e] ? of[e] : A(0);
        else
          values[e] = of[e] * power.derivative(values[e]);
      }
      if (at < column.periods) put<N>(g, values);
      g.advance(g_step);
    }
  }
}

template <int N, class S, class A, class Fold>
__device__ __forceinline__ void gradient_of_rows(const Pass& pass, uint32_t sample, uint32_t unit,
                                                 const typename Fold::Raise& power,
                                                 const Slopes<A>& slopes) {
  const uint32_t lanes = pass.lanes, lane = threadIdx.x % lanes, slots = kMapThreads / lanes;
  const uint32_t end = min(unit * pass.width + pass.width, pass.positions);
  const uint32_t channels = pass.channels;
  const int64_t x_step = slots * pass.position[0], g_step = slots * pass.position[1];
  for (uint32_t first = unit * pass.width + threadIdx.x / lanes; first < end;
       first += kRows * slots) {
    A of[kRows];
    uint32_t argmax[kRows];
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      const uint32_t position = first + i * slots;
      if (position >= end) continue;
      of[i] = slopes.at(position);
      if constexpr (Fold::kHasArgmax) argmax[i] = uint32_t(slopes.argmax[position]);
    }
    const Cells<S> x_row(pass.data[0], pass.dtype,
                         sample * pass.sample[0] + first * pass.position[0]);
    const Cells<S> g_row(pass.data[1], pass.dtype,
                         sample * pass.sample[1] + first * pass.position[1]);
    for (uint32_t c = lane * N; c < channels; c += lanes * N) {
      Raw<S, N> raw[kRows];
      Cells<S> x = x_row.from(c), g = g_row.from(c);
      if constexpr (!Fold::kHasArgmax) {
#pragma unroll
        for (uint32_t i = 0; i < kRows; ++i) {
          if (first + i * slots < end) raw[i].fetch(x);
          x.advance(x_step);
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kRows; ++i) {
        A values[N];
        if constexpr (!Fold::kHasArgmax) raw[i].widen_to(values, x);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if constexpr (Fold::kHasArgmax)
            values[e] = c + e == argmax[i] ? of[i] : A(0);
          else
            values[e] = of[i] * power.derivative(values[e]);
        }
        if (first + i * slots < end) put<N>(g, values);
        g.advance(g_step);
      }
    }
  }
}

template <class A, class Fold>
__device__ __forceinline__ void gradient_unit(const Pass& pass, const Axis* axes, uint32_t sample,
                                              uint32_t unit, const typename Fold::Raise& power,
                                              const Slopes<A>& slopes) {
  with_accesses<A>(pass, [&](auto* storage, auto length) {
    using S = std::remove_pointer_t<decltype(storage)>;
    constexpr int N = decltype(length)::value;
    if (pass.access == Access::planes)
      gradient_of_columns<N, S, A, Fold>(pass, axes, sample, unit, power, slopes);
    else
      gradient_of_rows<N, S, A, Fold>(pass, sample, unit, power, slopes);
  });
}

}  // namespace fastkd::cuda::maps
