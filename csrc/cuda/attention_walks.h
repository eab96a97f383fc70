// The ways of a block through one unit of a feature map: to the map, and to a gradient.
#pragma once

#include "attention_jobs.h"
#include "attention_power.h"

namespace fastkd::cuda {

// Elements of one width. Both dtypes of 16 bits share their code: what tells them apart is one
// selection, and a kernel holds all of this.
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
  __device__ __forceinline__ float widened(S x) const {
    if constexpr (std::is_same_v<S, float>) {
      return x;
    } else {
      const float of_bf16 = __uint_as_float(unsigned(x) << 16);
      return is_bf16 ? of_bf16 : widen(__ushort_as_half(x));
    }
  }
  __device__ __forceinline__ S narrowed(float x) const {
    if constexpr (std::is_same_v<S, float>) {
      return x;
    } else {
      return is_bf16 ? __bfloat16_as_ushort(narrow<__nv_bfloat16>(x))
                     : __half_as_ushort(narrow<__half>(x));
    }
  }
};

// N elements as they lie in memory: a vector, one element, or one of any dtype.
template <class S, int N>
struct Raw {
  Vector<S, N> values;
  __device__ __forceinline__ void fetch(const Cells<S>& from) { values = load<N>(from.data); }
  __device__ __forceinline__ float at(int e, const Cells<S>& from) const {
    return from.widened(values.values[e]);
  }
};
template <class S>
struct Raw<S, 1> {
  S value;
  __device__ __forceinline__ void fetch(const Cells<S>& from) { value = *from.data; }
  __device__ __forceinline__ float at(int, const Cells<S>& from) const {
    return from.widened(value);
  }
};
template <>
struct Cells<Any> : Elements<Any> {
  using Elements<Any>::Elements;
  __device__ __forceinline__ Cells from(int64_t count) const {
    Cells there = *this;
    there.advance(count);
    return there;
  }
};
template <>
struct Raw<Any, 1> {
  double value;
  __device__ __forceinline__ void fetch(const Cells<Any>& from) { value = from.load(0); }
  __device__ __forceinline__ double at(int, const Cells<Any>&) const { return value; }
};

template <int N, class S, class A>
__device__ __forceinline__ void put(const Cells<S>& to, const A (&values)[N]) {
  if constexpr (std::is_same_v<S, Any>) {
    to.store(0, values[0]);
  } else if constexpr (N == 1) {
    *to.data = to.narrowed(values[0]);
  } else {
    Vector<S, N> v;
#pragma unroll
    for (int e = 0; e < N; ++e) v.values[e] = to.narrowed(values[e]);
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
    periods = exists ? pass.periods + (index < pass.rest) : 0;
  }
};

// Accesses in flight by a thread: of vectors four are 64 bytes.
template <int N>
constexpr int kAtOnce = N > 1 ? 4 : 8;

template <class A>
struct MapRoom {
  A values[kMapThreads * 8];
  int channels[kMapThreads * 8];
};

// keep(position, what was found there) each of the unit's positions.
template <int N, class S, class A, class Fold, class Keep>
__device__ void fold_columns(const Pass& pass, const Axis* axes, uint32_t sample, uint32_t unit,
                             const typename Fold::Raise& power, MapRoom<A>& room,
                             const Keep& keep) {
  const Column column(pass, unit);
  const uint32_t planes = pass.planes, positions = pass.positions;
  Fold folds[N];
  if (column.periods > 0) {
    const int64_t start = N > 1 ? int64_t(column.index) * N : offset_of(pass, axes, column.index, 0);
    const int64_t period = pass.channel[0] * planes;
    Cells<S> x(pass.data[0], pass.dtype,
               sample * pass.sample[0] + start + column.first * period);
    const int64_t step = column.groups * period;
    for (uint32_t k = column.first; k < column.periods; k += kAtOnce<N> * column.groups) {
      Raw<S, N> raw[kAtOnce<N>];
#pragma unroll
      for (int i = 0; i < kAtOnce<N>; ++i) {
        if (k + i * column.groups < column.periods) raw[i].fetch(x);
        x.advance(step);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce<N>; ++i) {
        if (k + i * column.groups >= column.periods) continue;
#pragma unroll
        for (int e = 0; e < N; ++e) folds[e].see(A(raw[i].at(e, x)), int(k + i * column.groups), power);
      }
    }
  }
  // By groups, and within one as the columns lie.
  const uint32_t row = pass.width * N;
  if (column.first < column.groups) {
    A* const values = room.values + column.first * row + column.in_unit * N;
    int* const channels = room.channels + column.first * row + column.in_unit * N;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      values[e] = folds[e].value;
      if constexpr (Fold::kHasWinner) {
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
        other.value = room.values[g * row + i];
        if constexpr (Fold::kHasWinner) other.channel = room.channels[g * row + i];
        fold.merge(other);
      }
    keep(begin + q, fold);
  }
}

template <int N, class S, class A, class Fold, class Keep>
__device__ void fold_rows(const Pass& pass, const Axis* axes, uint32_t sample, uint32_t unit,
                          const typename Fold::Raise& power, const Keep& keep) {
  constexpr int kRows = 4;
  const uint32_t lanes = pass.lanes, lane = threadIdx.x % lanes, slots = kMapThreads / lanes;
  const uint32_t end = min(unit * pass.width + pass.width, pass.positions);
  const uint32_t vectors = pass.channels / N;
  // Whole warps go round, for the sake of their shuffles.
  for (uint32_t base = unit * pass.width; base < end; base += kRows * slots) {
    const uint32_t first = base + threadIdx.x / lanes;
    Fold folds[kRows];
    int64_t rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      rows[i] = first + i * slots < end ? offset_of(pass, axes, first + i * slots, 0) : 0;
    Cells<S> x(pass.data[0], pass.dtype, sample * pass.sample[0] + lane * N);
    for (uint32_t v = lane; v < vectors; v += lanes) {
      Raw<S, N> raw[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (first + i * slots < end) raw[i].fetch(x.from(rows[i]));
      x.advance(lanes * N);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i * slots >= end) continue;
#pragma unroll
        for (int e = 0; e < N; ++e) folds[i].see(A(raw[i].at(e, x)), int(v * N + e), power);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      for (int across = int(lanes) / 2; across > 0; across /= 2)
        folds[i].merge(folds[i].of_lane_across(across));
      if (lane == 0 && first + i * slots < end) keep(first + i * slots, folds[i]);
    }
  }
}

// What a position's features are multiplied with, or the winning one is set to.
template <class A>
struct Slopes {
  const A* values;  // of the sample
  const int32_t* winners;
  A factor;
  __device__ __forceinline__ A at(uint32_t position) const { return values[position] * factor; }
};

template <int N, class S, class A, class Fold>
__device__ void gradient_of_columns(const Pass& pass, const Axis* axes, uint32_t sample,
                                    uint32_t unit, const typename Fold::Raise& power,
                                    const Slopes<A>& slopes) {
  const Column column(pass, unit);
  if (column.periods == 0) return;
  const uint32_t planes = pass.planes;
  A of[N];
  uint32_t winners[N];  // periods
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const uint32_t plane = planes > 1 ? (column.index * N + e) / pass.positions : 0;
    const uint32_t position = column.index * N + e - plane * pass.positions;
    of[e] = slopes.at(position);
    if constexpr (Fold::kHasWinner) {
      const uint32_t from = uint32_t(slopes.winners[position]) - plane, period = from / planes;
      winners[e] = period * planes == from ? period : UINT32_MAX;
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
    if constexpr (!Fold::kHasWinner) {
#pragma unroll
      for (int i = 0; i < kAtOnce<N>; ++i) {
        if (k + i * column.groups < column.periods) raw[i].fetch(x);
        x.advance(x_step);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce<N>; ++i) {
      const uint32_t at = k + i * column.groups;
      A values[N];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        if constexpr (Fold::kHasWinner)
          values[e] = at == winners[e] ? of[e] : A(0);
        else
          values[e] = of[e] * power.derivative(A(raw[i].at(e, x)));
      }
      if (at < column.periods) put<N>(g, values);
      g.advance(g_step);
    }
  }
}

template <int N, class S, class A, class Fold>
__device__ void gradient_of_rows(const Pass& pass, const Axis* axes, uint32_t sample, uint32_t unit,
                                 const typename Fold::Raise& power, const Slopes<A>& slopes) {
  constexpr int kRows = 4;
  const uint32_t lanes = pass.lanes, lane = threadIdx.x % lanes, slots = kMapThreads / lanes;
  const uint32_t end = min(unit * pass.width + pass.width, pass.positions);
  const uint32_t vectors = pass.channels / N;
  const Cells<S> x(pass.data[0], pass.dtype, sample * pass.sample[0]);
  const Cells<S> g(pass.data[1], pass.dtype, sample * pass.sample[1]);
  for (uint32_t first = unit * pass.width + threadIdx.x / lanes; first < end;
       first += kRows * slots) {
    A of[kRows];
    uint32_t winners[kRows];
    int64_t from[kRows], to[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t position = first + i * slots;
      if (position >= end) continue;
      of[i] = slopes.at(position);
      if constexpr (Fold::kHasWinner) winners[i] = uint32_t(slopes.winners[position]);
      from[i] = offset_of(pass, axes, position, 0);
      to[i] = offset_of(pass, axes, position, 1);
    }
    for (uint32_t v = lane; v < vectors; v += lanes) {
      Raw<S, N> raw[kRows];
      if constexpr (!Fold::kHasWinner) {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (first + i * slots < end) raw[i].fetch(x.from(from[i] + int64_t(v) * N));
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i * slots >= end) continue;
        A values[N];
#pragma unroll
        for (int e = 0; e < N; ++e) {
          if constexpr (Fold::kHasWinner)
            values[e] = v * N + e == winners[i] ? of[i] : A(0);
          else
            values[e] = of[i] * power.derivative(A(raw[i].at(e, x)));
        }
        put<N>(g.from(to[i] + int64_t(v) * N), values);
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
                                          MapRoom<A>& room, const Keep& keep) {
  with_accesses<A>(pass, [&](auto* storage, auto length) {
    using S = std::remove_pointer_t<decltype(storage)>;
    constexpr int N = decltype(length)::value;
    if (pass.walk == Walk::planes)
      fold_columns<N, S, A, Fold>(pass, axes, sample, unit, power, room, keep);
    else
      fold_rows<N, S, A, Fold>(pass, axes, sample, unit, power, keep);
  });
}

template <class A, class Fold>
__device__ __forceinline__ void gradient_unit(const Pass& pass, const Axis* axes, uint32_t sample,
                                              uint32_t unit, const typename Fold::Raise& power,
                                              const Slopes<A>& slopes) {
  with_accesses<A>(pass, [&](auto* storage, auto length) {
    using S = std::remove_pointer_t<decltype(storage)>;
    constexpr int N = decltype(length)::value;
    if (pass.walk == Walk::planes)
      gradient_of_columns<N, S, A, Fold>(pass, axes, sample, unit, power, slopes);
    else
      gradient_of_rows<N, S, A, Fold>(pass, axes, sample, unit, power, slopes);
  });
}

}  // namespace fastkd::cuda
