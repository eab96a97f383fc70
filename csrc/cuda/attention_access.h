// How a thread of attention reads and writes features: elements, and columns of planes.
#pragma once

#include "attention_jobs.h"
#include "storage.h"

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

// Positions of rows that are in hand at a time.
constexpr uint32_t kRows = 4;

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

}  // namespace fastkd::cuda::maps
