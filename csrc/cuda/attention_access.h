// The ways of a block through one unit of a feature map: to the map, and to a gradient.
#pragma once

#include "attention_jobs.h"
#include "attention_power.h"
#include "bulk_copy.h"

namespace fastkd::cuda::maps {

// Elements of one width. Both dtypes of 16 bits share the code around what tells them apart, and so
// a kernel holds less of it.
template <class S>
struct Cells {
  S* data;
  bool is_bf16;

  __device__ __forceinline__ Cells(char* memory, DType dtype, int64_t offset)
      : data(reinterpret_cast<S*>(memory) + offset), is_bf16(dtype == DType::bf16) {}
  __device__ __forceinline__ void advance(int64_t count) { data += count; }
  __device__ __forceinline__ Cells from(int64_t count) const {
    Cells there = *this;
    there.advance(count);
    return there;
  }

  template <int N>
  __device__ __forceinline__ void widen_all(const S (&raw)[N], float (&to)[N]) const {
    if constexpr (std::is_same_v<S, float>) {
#pragma unroll
      for (int e = 0; e < N; ++e) to[e] = raw[e];
    } else if (is_bf16) {
#pragma unroll
      for (int e = 0; e < N; ++e) to[e] = widen(__ushort_as_bfloat16(raw[e]));
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) to[e] = widen(__ushort_as_half(raw[e]));
    }
  }
  template <int N>
  __device__ __forceinline__ void narrow_all(const float (&values)[N], S (&to)[N]) const {
    if constexpr (std::is_same_v<S, float>) {
#pragma unroll
      for (int e = 0; e < N; ++e) to[e] = values[e];
    } else if (is_bf16) {
#pragma unroll
      for (int e = 0; e < N; ++e) to[e] = __bfloat16_as_ushort(narrow<__nv_bfloat16>(values[e]));
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) to[e] = __half_as_ushort(narrow<__half>(values[e]));
    }
  }
};

template <>
struct Cells<Any> : Elements<Any> {
  using Elements<Any>::Elements;
  __device__ __forceinline__ void advance(int64_t count) { data += count * size_of(dtype); }
  __device__ __forceinline__ Cells from(int64_t count) const {
    Cells there = *this;
    there.advance(count);
    return there;
  }
};

// N elements as they lie in memory: a vector, one element, or one of any dtype.
template <class S, int N>
struct Raw {
  Vector<S, N> vector;
  __device__ __forceinline__ void fetch(const Cells<S>& from) { vector = load<N>(from.data); }
  __device__ __forceinline__ void fetch(const Cells<S>& from, uint64_t policy) {
    vector = load<N>(from.data, policy);
  }
  __device__ __forceinline__ void widen_to(float (&to)[N], const Cells<S>& from) const {
    from.widen_all(vector.values, to);
  }
};
template <class S>
struct Raw<S, 1> {
  S value[1];
  __device__ __forceinline__ void fetch(const Cells<S>& from, uint64_t = 0) {
    value[0] = *from.data;
  }
  __device__ __forceinline__ void widen_to(float (&to)[1], const Cells<S>& from) const {
    from.widen_all(value, to);
  }
};
template <>
struct Raw<Any, 1> {
  double value;
  __device__ __forceinline__ void fetch(const Cells<Any>& from, uint64_t = 0) {
    value = from.load(0);
  }
  __device__ __forceinline__ void widen_to(double (&to)[1], const Cells<Any>&) const {
    to[0] = value;
  }
};

template <int N, class S, class A>
__device__ __forceinline__ void put(const Cells<S>& to, const A (&values)[N]) {
  if constexpr (std::is_same_v<S, Any>) {
    to.store(0, values[0]);
  } else if constexpr (N == 1) {
    S one[1];
    to.narrow_all(values, one);
    *to.data = one[0];
  } else {
    Vector<S, N> v;
    to.narrow_all(values, v.values);
    store<N>(v, to.data);
  }
}

__device__ __forceinline__ int64_t offset_of(const Pass& pass, const Axis* axes, uint32_t position,
                                             int tensor) {
  if (pass.axes == 0) return position * pass.position[tensor];
  int64_t offset = 0;
#pragma unroll 1
  for (int a = pass.axes - 1; a >= 0; --a) {
    const Axis& axis = axes[pass.first_axis + a];
    const uint32_t outer = position / uint32_t(axis.size);
    offset += int64_t(position - outer * uint32_t(axis.size)) * axis.stride[tensor];
    position = outer;
  }
  return offset;
}

// A thread's column, and the periods that it goes through: every `groups`-th from `first` on. Where
// there is no column there are no periods.
struct Column {
  uint32_t index, first, groups, periods, in_unit;
  __device__ __forceinline__ Column(const Pass& pass, uint32_t unit) {
    const uint32_t width = pass.width;
    groups = kMapThreads / width;
    first = threadIdx.x / width;
    in_unit = threadIdx.x - first * width;
    index = unit * width + in_unit;
    const bool exists = first < groups && index < pass.columns;
    periods = exists ? pass.periods : 0;
  }
};

// Accesses in flight by a thread.
template <int N>
constexpr uint32_t kAtOnce = N > 1 ? 4 : 8;

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

// Positions that are in hand at a time.
constexpr uint32_t kRows = 4;

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

// f(null pointer of the storage type, accesses of so many elements)
template <class A, class F>
__device__ __forceinline__ void with_accesses(const Pass& pass, const F& f) {
  if constexpr (std::is_same_v<A, double>) {
    f(static_cast<Any*>(nullptr), std::integral_constant<int, 1>());
  } else {
    const auto with_width = [&](auto* storage) {
      constexpr int whole = kAccess / sizeof(*storage);
      if (pass.by_vectors)
        f(storage, std::integral_constant<int, whole>());
      else
        f(storage, std::integral_constant<int, 1>());
    };
    if (pass.dtype == DType::f32)
      with_width(static_cast<float*>(nullptr));
    else
      with_width(static_cast<uint16_t*>(nullptr));
  }
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
