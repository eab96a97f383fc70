// A block's way through one unit of features to the map.
#pragma once

#include "attention_access.h"
#include "attention_power.h"
#include "bulk_copy.h"

namespace fastkd::cuda::maps {

// What the threads of a block have of a map: float32 of 8 columns each at most, or float64 of one.
struct ColumnsShared {
  alignas(double) char values[kMapThreads * 8 * sizeof(float)];
  int channels[kMapThreads * 8];
};

struct UnitShared {
  Mbarrier arrival;
  union {
    ColumnsShared columns;
    alignas(16) char copied[kHasBulkCopies ? kMostCopy : 16];
  };
  // Where there are no bulk copies.
  static constexpr size_t kLeastBytes = 16 + sizeof(ColumnsShared);
};

// keep(position, what was found there) each of the unit's positions.
template <int N, class S, class A, class Fold, class Keep>
__device__ __forceinline__ void fold_columns(const Pass& pass, const Axis* axes, uint32_t sample,
                                             uint32_t unit, const typename Fold::Raise& power,
                                             ColumnsShared& shared, const Keep& keep) {
  const Column column(pass, unit);
  const uint64_t policy = eviction(pass.is_once);
  const uint32_t planes = pass.planes, positions = pass.positions;
  Fold folds[N];
  if (column.periods > 0) {
    const int64_t start =
        N > 1 ? int64_t(column.index) * N : offset_of(pass, axes, column.index, 0);
    const int64_t period = pass.channel[0] * planes;
    Cells<S> x(pass.data[0], pass.dtype, sample * pass.sample[0] + start + column.first * period);
    const int64_t step = column.groups * period;
    for (uint32_t k = column.first; k < column.periods; k += kAtOnce<N> * column.groups) {
      Raw<S, N> raw[kAtOnce<N>];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce<N>; ++i) {
        if (k + i * column.groups < column.periods) raw[i].fetch(x, policy);
        x.advance(step);
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce<N>; ++i) {
        if (k + i * column.groups >= column.periods) continue;
        A values[N];
        raw[i].widen_to(values, x);
#pragma unroll
        for (int e = 0; e < N; ++e) folds[e].see(values[e], int(k + i * column.groups), power);
      }
    }
  }
  // By groups, and within one as the columns lie.
  A* const found = reinterpret_cast<A*>(shared.values);
  const uint32_t row = pass.width * N;
  if (column.first < column.groups) {
    A* const values = found + column.first * row + column.in_unit * N;
    int* const channels = shared.channels + column.first * row + column.in_unit * N;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      values[e] = folds[e].value;
      if constexpr (Fold::kHasArgmax) {
        const bool saw = folds[e].channel != INT32_MAX;
        const uint32_t plane = planes > 1 ? (column.index * N + e) / positions : 0;
        channels[e] = saw ? folds[e].channel * int(planes) + int(plane) : INT32_MAX;
      }
    }
  }
  __syncthreads();
  const uint32_t begin = unit * row, left = pass.columns * N - begin;
  const uint32_t elements = left < row ? left : row, distinct = planes > 1 ? positions : elements;
  for (uint32_t q = threadIdx.x; q < distinct; q += kMapThreads) {
    Fold fold;
    for (uint32_t i = q; i < elements; i += distinct)
      for (uint32_t g = 0; g < column.groups; ++g) {
        Fold other;
        other.value = found[g * row + i];
        if constexpr (Fold::kHasArgmax) other.channel = shared.channels[g * row + i];
        fold.merge(other);
      }
    keep(begin + q, fold);
  }
}

// Positions from `begin` on, whose first one `rows` begins with; `fetch` reads some elements of
// one.
template <int N, class S, class A, class Fold, class Fetch, class Keep>
__device__ __forceinline__ void fold_rows(const Pass& pass, uint32_t begin, uint32_t end,
                                          const Cells<S>& rows, int64_t stride,
                                          const typename Fold::Raise& power, const Fetch& fetch,
                                          const Keep& keep) {
  const uint32_t lanes = pass.lanes, lane = threadIdx.x % lanes, slots = kMapThreads / lanes;
  const uint32_t channels = pass.channels;
  const int64_t step = slots * stride;
  // Whole warps go round, for the sake of their shuffles.
  for (uint32_t base = begin; base < end; base += kRows * slots) {
    const uint32_t first = base + threadIdx.x / lanes;
    const Cells<S> row = rows.from((first - begin) * stride);
    Fold folds[kRows];
    for (uint32_t c = lane * N; c < channels; c += lanes * N) {
      Raw<S, N> raw[kRows];
      Cells<S> x = row.from(c);
#pragma unroll
      for (uint32_t i = 0; i < kRows; ++i) {
        if (first + i * slots < end) fetch(raw[i], x);
        x.advance(step);
      }
#pragma unroll
      for (uint32_t i = 0; i < kRows; ++i) {
        if (first + i * slots >= end) continue;
        A values[N];
        raw[i].widen_to(values, x);
#pragma unroll
        for (int e = 0; e < N; ++e) folds[i].see(values[e], int(c) + e, power);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kRows; ++i) {
      for (uint32_t across = lanes / 2; across > 0; across /= 2)
        folds[i].merge(folds[i].of_lane_across(int(across)));
      if (lane == 0 && first + i * slots < end) keep(first + i * slots, folds[i]);
    }
  }
}

template <int N, class S, class A, class Fold, class Keep>
__device__ __forceinline__ void fold_read_rows(const Pass& pass, uint32_t sample, uint32_t unit,
                                               const typename Fold::Raise& power,
                                               const Keep& keep) {
  const uint32_t begin = unit * pass.width, end = min(begin + pass.width, pass.positions);
  const int64_t stride = pass.position[0];
  const Cells<S> rows(pass.data[0], pass.dtype, sample * pass.sample[0] + begin * stride);
  const uint64_t policy = eviction(pass.is_once);
  fold_rows<N, S, A, Fold>(
      pass, begin, end, rows, stride, power,
      [&](Raw<S, N>& raw, const Cells<S>& x) { raw.fetch(x, policy); }, keep);
}

// Units differ by one position at most, and the longer ones come first.
template <int N, class S, class A, class Fold, class Keep>
__device__ __forceinline__ void fold_copied_rows(const Pass& pass, uint32_t sample, uint32_t unit,
                                                 const typename Fold::Raise& power,
                                                 UnitShared& shared, const Keep& keep) {
  const uint32_t longer = pass.positions - pass.width * pass.units;
  const uint32_t begin = unit * pass.width + min(unit, longer);
  const uint32_t end = begin + pass.width + (unit < longer);
  if (threadIdx.x == 0) {
    const int64_t offset = sample * pass.sample[0] + int64_t(begin) * pass.channels;
    const uint32_t bytes = (end - begin) * pass.channels * uint32_t(sizeof(S));
    shared.arrival.init();
    shared.arrival.expect(bytes);
    copy_bulk(shared.copied, pass.data[0] + offset * int64_t(sizeof(S)), bytes, shared.arrival,
              eviction(pass.is_once));
  }
  __syncthreads();
  shared.arrival.wait(0);
  fold_rows<N, S, A, Fold>(
      pass, begin, end, Cells<S>(shared.copied, pass.dtype, 0), pass.channels, power,
      [](Raw<S, N>& raw, const Cells<S>& x) { raw.fetch(x); }, keep);
}

template <class A, class Fold, class Keep>
__device__ __forceinline__ void fold_unit(const Pass& pass, const Axis* axes, uint32_t sample,
                                          uint32_t unit, const typename Fold::Raise& power,
                                          UnitShared& shared, const Keep& keep) {
  with_accesses<A>(pass, [&](auto* storage, auto length) {
    using S = std::remove_pointer_t<decltype(storage)>;
    constexpr int N = decltype(length)::value;
    if (pass.access == Access::planes)
      return fold_columns<N, S, A, Fold>(pass, axes, sample, unit, power, shared.columns, keep);
    if constexpr (kHasBulkCopies && N > 1)
      if (pass.access == Access::copied_rows)
        return fold_copied_rows<N, S, A, Fold>(pass, sample, unit, power, shared, keep);
    fold_read_rows<N, S, A, Fold>(pass, sample, unit, power, keep);
  });
}

}  // namespace fastkd::cuda::maps
