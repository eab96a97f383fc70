// How long rows of a student and one teacher come to shared memory: side by side, each thread what
// it computes itself.
#pragma once

#include "soft_target_long_part.h"

namespace fastkd::cuda::logits {

template <class S, class T>
constexpr int kPairPlanes = planes_of<S>(kVector<S, T>) + planes_of<T>(kVector<S, T>);

template <bool kIsCluster, class S, class T, int kVectors>
struct Pair : LongPart<kIsCluster, kVector<S, T>, kVectors, kPairPlanes<S, T>> {
  using RowPart = LongPart<kIsCluster, kVector<S, T>, kVectors, kPairPlanes<S, T>>;
  using RowPart::call, RowPart::N, RowPart::stage, RowPart::thread, RowPart::threads, RowPart::V;

  __device__ __forceinline__ Stage of_student(int v) const { return stage(v); }
  __device__ __forceinline__ Stage of_teacher(int v) const {
    return stage(v).plane(planes_of<S>(N));
  }

  __device__ __forceinline__ void fetch_elements(int v, const Start<>& start, int i,
                                                 int classes) const {
    of_student(v).template fetch_elements<S, N>(call.sides[kStudent], start.at[kStudent], i,
                                                classes);
    of_teacher(v).template fetch_elements<T, N>(call.sides[kTeacher], start.at[kTeacher], i,
                                                classes);
  }
  __device__ __forceinline__ void fetch_whole(int v, const Start<>& start, int i) const {
    of_student(v).template fetch_whole<S, N>(call.sides[kStudent], start.at[kStudent], i);
    of_teacher(v).template fetch_whole<T, N>(call.sides[kTeacher], start.at[kTeacher], i);
  }
  __device__ __forceinline__ void fetch(const QueuedRow& row) const {
    const Start<>& start = row.start;
    if (row.row == call.rows) return;
    if (this->is_even())
      fetch_even(start);
    else
      this->over_vectors_rolled(start.phase, [&](int v, int i) {
        if (start.is_aligned && i >= 0 && i + N <= int(call.classes))
          fetch_whole(v, start, i);
        else
          fetch_elements(v, start, i, int(call.classes));
      });
    __pipeline_commit();
  }
  __device__ __forceinline__ void fetch_even(const Start<>& start) const {
    if constexpr (std::is_same_v<S, Any>) {
      this->over_vectors(0, [&](int v, int i) { fetch_whole(v, start, i); });
    } else {
      const int64_t first = (this->first_vector() + thread) * N;
      const S* s =
          reinterpret_cast<const S*>(call.sides[kStudent].data) + start.at[kStudent] + first;
      const T* t =
          reinterpret_cast<const T*>(call.sides[kTeacher].data) + start.at[kTeacher] + first;
      char* to = of_student(0).data;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (this->has(v)) {
          __pipeline_memcpy_async(to, s, kAccess);
          __pipeline_memcpy_async(to + threads * kAccess, t, kAccess);
        }
        to += kPairPlanes<S, T> * threads * kAccess;
        s += threads * N;
        t += threads * N;
      }
    }
  }
  // What has no vector in any row is excluded classes for good.
  __device__ __forceinline__ void fill_absent() const {
#pragma unroll 1
    for (int v = 0; v < V; ++v)
      if (!this->has(v)) fetch_elements(v, Start<>{}, 0, 0);
  }
};

}  // namespace fastkd::cuda::logits
