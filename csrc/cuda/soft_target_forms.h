// The forms that a call on logits can take, and what they share: rows on the chip, columns (rows
// side by side), a stream of classes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "soft_target.h"

namespace fastkd::cuda::logits {

// The thresholds between the forms. A thread holds two exponentials of so many classes, 64
// registers of at most 128: a multiprocessor then has 512 threads, and 16,384 classes, at a time.
constexpr int kHeld = 32;
constexpr int kMixedHeld = 24;  // where dtypes differ: what they are takes registers
constexpr int kFloatHeld = 28;  // a block's own rows of float32, for the same lack of registers
constexpr int kFew = 8;         // where a warp is a row's, and the row is short
constexpr int kWarpRowThreads = 128;
constexpr int kBlockThreads = 256;  // as long as a cluster of such blocks holds the row: two of
constexpr int kMostThreads = 512;   // them on a multiprocessor, and one computes as the other waits
constexpr int kMostCluster = 16;

// Blocks of kWarpRowThreads on a multiprocessor: up to 168 registers a thread, or 80.
constexpr int blocks_together(int classes) { return classes > kFew ? 3 : 6; }

struct Blocks {
  int threads, cluster;
};
constexpr Blocks kClusters[] = {{kBlockThreads, 2},  {kBlockThreads, 4}, {kBlockThreads, 8},
                                {kBlockThreads, 16}, {kMostThreads, 8},  {kMostThreads, 16}};

enum class Scope { warp, block, cluster };  // who has a row

// The memory that a launch brings: for the sums of its blocks, and to find the last of them.
struct Scratch {
  unsigned* counter;
  Tickets tickets(const Stream& stream) const { return cuda::tickets(stream, counter); }
};

// Gives a call its place for the sums of blocks, and counts its labels where they are many.
Scratch prepare(Call& call, void* scratch, const Stream& stream);

// Fills memory with zeros, if there is any.
void clear(void* p, int64_t elements, DType dtype, const Stream& stream);

// The columns form knows no float64, and neither do rows, which returns whether it has served the
// call.
void launch_columns(const Call& call, const Scratch& scratch, const Stream& stream);
bool launch_rows(const Call& call, const Scratch& scratch, const Stream& stream);
void launch_stream(const Call& call, const Scratch& scratch, const Stream& stream);
void launch_backward(const Call& call, bool are_columns, const Stream& stream);

// f(null pointers of the two storage types). Pairs of one dtype have kernels of their own; float64
// is not among them.
inline bool is_double(const Call& call) {
  return call.sides[kStudent].dtype == DType::f64 || call.sides[kTeacher].dtype == DType::f64;
}
template <class F>
void with_storage_of(const Call& call, const F& f) {
  const DType one = call.sides[kStudent].dtype, other = call.sides[kTeacher].dtype;
  if (one != other) return f(static_cast<Any*>(nullptr), static_cast<Any*>(nullptr));
  with_storage(one, [&](auto* storage) { f(storage, storage); });
}

// Classes that a thread moves at a time: 16 bytes of the smaller elements.
template <class S, class T>
constexpr int kVector = kAccess / int(sizeof(S) < sizeof(T) ? sizeof(S) : sizeof(T));
template <>
constexpr int kVector<Any, Any> = kAccess / 2;

template <class S>
constexpr int planes_of(int classes) {
  return classes * int(sizeof(S)) / kAccess;
}
template <>
constexpr int planes_of<Any>(int classes) {
  return classes * int(sizeof(float)) / kAccess;
}

// Where a row begins, and how many elements its first vector begins before it. Vectors that lie in
// the row are aligned in all tensors, or in none.
template <int kOfThem = kToStudent + 1>
struct Start {
  int64_t at[kOfThem];
  int phase;
  bool is_aligned;
};

template <int N, int kOfThem = kToStudent + 1>
__device__ __forceinline__ Start<kOfThem> start_of(const Call& call, uint32_t row) {
  Start<kOfThem> start;
  locate(call, row, start.at);
  start.phase = 0;
  start.is_aligned = call.is_aligned;
  if (call.is_aligned || !call.is_dense) return start;
  const auto address = [&](Side side) {
    const Tensor& tensor = call.sides[side];
    return reinterpret_cast<uintptr_t>(tensor.data) + start.at[side] * size_of(tensor.dtype);
  };
  const bool by_teacher = size_of(call.sides[kTeacher].dtype) < size_of(call.sides[kStudent].dtype);
  start.phase = by_teacher ? int(address(kTeacher) / size_of(call.sides[kTeacher].dtype) % N)
                           : int(address(kStudent) / size_of(call.sides[kStudent].dtype) % N);
  const auto meets = [&](Side side) {
    const Tensor& tensor = call.sides[side];
    return tensor.data == nullptr ||
           (address(side) - start.phase * size_of(tensor.dtype)) % kAccess == 0;
  };
  start.is_aligned = meets(kStudent) && meets(kTeacher) && meets(kToStudent);
  if constexpr (kOfThem > kToTeacher) start.is_aligned = start.is_aligned && meets(kToTeacher);
  if (!start.is_aligned) start.phase = 0;
  return start;
}

template <class S>
__device__ __forceinline__ double logit_of(const Tensor& tensor, int64_t row, int64_t label) {
  return Elements<S>(tensor.data, tensor.dtype, row).load(label * tensor.class_stride);
}

// N classes of one side. Those outside of the row are excluded ones.
template <class A, class S, int N>
__device__ __forceinline__ void take(const Tensor& from, int64_t row, int64_t i, int64_t classes,
                                     bool is_aligned, A (&to)[N]) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (is_aligned && i >= 0 && i + N <= classes) {
      as_storage<S>(from.dtype, [&](auto* storage) {
        using E = std::remove_pointer_t<decltype(storage)>;
        constexpr int kWidth = kAccess / sizeof(E);
        const E* const data = reinterpret_cast<const E*>(from.data) + row + i;
#pragma unroll
        for (int first = 0; first < N; first += kWidth) {
          const auto v = load<kWidth>(data + first);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) to[first + k] = widen(v.values[k]);
        }
      });
      return;
    }
  }
  const Elements<S> elements(from.data, from.dtype, row);
#pragma unroll
  for (int k = 0; k < N; ++k)
    to[k] = i + k >= 0 && i + k < classes ? A(elements.load((i + k) * from.class_stride))
                                          : A(-INFINITY);
}

// Writes N elements of a gradient, or those of them that exist.
template <class S, class A, int N>
__device__ __forceinline__ void give(const A (&g)[N], const Tensor& to, int64_t row, int64_t i,
                                     int64_t classes, bool is_aligned) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (is_aligned && i >= 0 && i + N <= classes) {
      as_storage<S>(to.dtype, [&](auto* storage) {
        using E = std::remove_pointer_t<decltype(storage)>;
        constexpr int kWidth = kAccess / sizeof(E);
        E* const data = reinterpret_cast<E*>(to.data) + row + i;
#pragma unroll
        for (int first = 0; first < N; first += kWidth) {
          Vector<E, kWidth> v;
#pragma unroll
          for (int k = 0; k < kWidth; ++k) v.values[k] = narrow<E>(g[first + k]);
          store<kWidth>(v, data + first);
        }
      });
      return;
    }
  }
  const Elements<S> elements(to.data, to.dtype, row);
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (i + k >= 0 && i + k < classes) elements.store((i + k) * to.class_stride, g[k]);
}

// Vectors that cover a row, wherever it begins.
inline int64_t vectors_of(const Call& call, int length) {
  return (call.classes + length - 1) / length + (call.is_dense && !call.is_aligned);
}

// A kernel's shared memory that is one struct, in bytes; what follows it is aligned.
template <class Shared>
constexpr size_t kHeader = (sizeof(Shared) + 127) / 128 * 128;

}  // namespace fastkd::cuda::logits
