// A thread's part in long rows: which classes it has, and how they come to shared memory.
#pragma once

#include "soft_target_long_rows.h"

namespace fastkd::cuda::logits {

// V vectors of a row, and of every row, are a thread's.
template <bool kIsCluster, class S, class T, int V>
struct Part {
  static constexpr int N = kVector<S, T>;
  static constexpr int kSides = planes_of<S>(N) + planes_of<T>(N), kHard = planes_of<float>(N);

  const Call& call;
  const Share& share;
  LongShared& shared;
  char* const stages;
  const int threads = blockDim.x, thread = threadIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;

  __device__ __forceinline__ static int rank() { return kIsCluster ? int(cluster_rank()) : 0; }
  // Whether every row is whole vectors, each of which lies where an access of 16 bytes may.
  __device__ __forceinline__ bool is_even() const {
    return call.is_aligned && int(call.classes) % N == 0;
  }

  // Of the block's vectors the first one, and how many there are: a cluster's last blocks may have
  // fewer.
  __device__ __forceinline__ int first_vector() const { return rank() * share.vectors; }
  __device__ __forceinline__ int vectors_here() const {
    return kIsCluster ? min(share.vectors, share.all - first_vector()) : share.vectors;
  }
  __device__ __forceinline__ bool has(int v) const { return v * threads + thread < vectors_here(); }
  // f(vector, its first class), for those that this thread has.
  template <class F>
  __device__ __forceinline__ void over_vectors(int phase, const F& f) const {
    const int first = (first_vector() + thread) * N - phase;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (has(v)) f(v, first + v * threads * N);
  }
  // Rolled, for what is rare.
  template <class F>
  __device__ __forceinline__ void over_vectors_rolled(int phase, const F& f) const {
    const int first = (first_vector() + thread) * N - phase;
#pragma unroll 1
    for (int v = 0; has(v); ++v) f(v, first + v * threads * N);
  }

  // What a thread copies for itself, vector by vector; and its exponentials at temperature 1.
  __device__ __forceinline__ Stage of_student(int v) const {
    return {stages + (v * kSides * threads + thread) * kAccess, threads * kAccess};
  }
  __device__ __forceinline__ Stage of_teacher(int v) const {
    return of_student(v).plane(planes_of<S>(N));
  }
  __device__ __forceinline__ Stage of_hard(int v) const {
    return {stages + ((V * kSides + v * kHard) * threads + thread) * kAccess, threads * kAccess};
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
    if (is_even())
      fetch_even(start);
    else
      over_vectors_rolled(start.phase, [&](int v, int i) {
        if (start.is_aligned && i >= 0 && i + N <= int(call.classes))
          fetch_whole(v, start, i);
        else
          fetch_elements(v, start, i, int(call.classes));
      });
    __pipeline_commit();
  }
  __device__ __forceinline__ void fetch_even(const Start<>& start) const {
    if constexpr (std::is_same_v<S, Any>) {
      over_vectors(0, [&](int v, int i) { fetch_whole(v, start, i); });
    } else {
      const int64_t first = (first_vector() + thread) * N;
      const S* s =
          reinterpret_cast<const S*>(call.sides[kStudent].data) + start.at[kStudent] + first;
      const T* t =
          reinterpret_cast<const T*>(call.sides[kTeacher].data) + start.at[kTeacher] + first;
      char* to = of_student(0).data;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (has(v)) {
          __pipeline_memcpy_async(to, s, kAccess);
          __pipeline_memcpy_async(to + threads * kAccess, t, kAccess);
        }
        to += kSides * threads * kAccess;
        s += threads * N;
        t += threads * N;
      }
    }
  }
  // What has no vector in any row is excluded classes for good.
  __device__ __forceinline__ void fill_absent() const {
#pragma unroll 1
    for (int v = 0; v < V; ++v)
      if (!has(v)) fetch_elements(v, Start<>{}, 0, 0);
  }
};

}  // namespace fastkd::cuda::logits
