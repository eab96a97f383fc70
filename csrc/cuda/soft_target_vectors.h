// Vectors of classes in the tensors of a row: where they begin, and how they are read and written.
#pragma once

#include <type_traits>

#include "soft_target.h"

namespace fastkd::cuda::logits {

// Classes that a thread moves at a time: 16 bytes of the smaller elements.
template <class S, class T>
constexpr int kVector = kAccess / int(sizeof(S) < sizeof(T) ? sizeof(S) : sizeof(T));
template <>
constexpr int kVector<Any, Any> = kAccess / 2;
template <class A, class S, class T>
constexpr int kClasses = sizeof(A) == sizeof(double) ? 1 : kVector<S, T>;

// Vectors that cover a row, wherever it begins.
inline int64_t vectors_of(const Call& call, int length) {
  return (call.classes + length - 1) / length + (call.is_dense && !call.is_aligned);
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
__device__ __forceinline__ Elements<S> elements_of(const Tensor& tensor, int64_t at) {
  return Elements<S>(tensor.data, tensor.dtype, at);
}

// Of a row's label, or 0 where it has none.
template <class S>
__device__ __forceinline__ double logit_of(const Call& call, int64_t row, int64_t label) {
  const Tensor& student = call.sides[kStudent];
  return label < 0 ? 0 : elements_of<S>(student, row).load(label * student.class_stride);
}

// Reads N classes of one side. Those outside of the row are excluded ones.
template <class A, class S, int N>
__device__ __forceinline__ void load_vector(const Tensor& from, int64_t row, int64_t i,
                                            int64_t classes, bool is_aligned, A (&to)[N]) {
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
  const auto elements = elements_of<S>(from, row);
#pragma unroll
  for (int k = 0; k < N; ++k)
    to[k] = i + k >= 0 && i + k < classes ? A(elements.load((i + k) * from.class_stride))
                                          : A(-INFINITY);
}

// Writes N elements of a gradient, or those of them that exist.
template <class S, class A, int N, int kOfThem>
__device__ __forceinline__ void store_vector(const A (&g)[N], const Call& call, Side side,
                                             const Start<kOfThem>& start, int64_t i) {
  const Tensor& to = call.sides[side];
  const int64_t row = start.at[side], classes = call.classes;
  if constexpr (sizeof(A) == sizeof(float)) {
    if (start.is_aligned && i >= 0 && i + N <= classes) {
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
  const auto elements = elements_of<S>(to, row);
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (i + k >= 0 && i + k < classes) elements.store((i + k) * to.class_stride, g[k]);
}

}  // namespace fastkd::cuda::logits
