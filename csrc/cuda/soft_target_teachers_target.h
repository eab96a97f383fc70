// The target of long rows of several teachers: what a thread's classes of them amount to. It reads
// one tensor after the other, and the next row, of whichever tensor, is on its way from memory to
// shared memory meanwhile.
#pragma once

#include "soft_target_long_part.h"
#include "soft_target_long_queue.h"
#include "soft_target_mean.h"

namespace fastkd::cuda::logits {

// A warp's part of a teacher's row: the sum of 2^(rate · logit − origin), where the origin is
// rate · maximum less `rest`.
struct alignas(16) PartialSum {
  float maximum = -INFINITY, sum = 0, rest = 0;
};

struct TeachersShared : LongShared {
  ClusterExchange<PartialSum, kMostCluster * kMostWarps> sums;
  int64_t starts[kQueue][kMostTeachers];  // of each queued row's teachers
};

template <int N>
struct TeachersStarts {
  const MeanCall& of;
  TeachersShared& shared;

  __device__ __forceinline__ Start<> student(uint32_t row) const {
    Start<> start;
    locate(of.call, row, start.at);
    start.phase = phase_of<N>(of.call, start.at[kStudent]);
    start.is_aligned = is_aligned(of.call.sides[kToStudent], start.at[kToStudent], start.phase);
    return start;
  }
  // A lane has some of the teachers.
  __device__ __forceinline__ void find(uint32_t row, int place, Start<>& to) const {
    const int lane = threadIdx.x % kWarp;
    for (int m = lane; m < of.count; m += kWarp)
      shared.starts[place][m] = start_of_teacher(of, row, m);
    if (lane == 0) to = student(row);
  }
};

template <bool kIsCluster, class S, int kVectors>
struct TeachersTarget {
  static constexpr int N = kVector<S, S>, V = kVectors;
  static constexpr bool kIsAny = std::is_same_v<S, Any>;
  using RowPart = LongPart<kIsCluster, N, V, planes_of<S>(N)>;
  using Classes = float[V * N];

  const MeanCall& of;
  TeachersShared& shared;
  const RowPart& part;
  const Call& call = of.call;
  const Share& share = part.share;
  const Queue<S, TeachersStarts<N>> queue{call, share, shared, {of, shared}};
  const MeanRates<float> rates = MeanRates<float>(of);
  const int warp = part.warp, lane = part.lane, warps = part.warps;

  __device__ __forceinline__ void fetch(const Tensor& from, int64_t at, int phase) const {
    const bool by_vectors = is_aligned(from, at, phase);
    if (by_vectors && part.is_even())
      fetch_even(from, at);
    else
      part.over_vectors_rolled(phase, [&](int v, int i) {
        if (by_vectors && i >= 0 && i + N <= int(call.classes))
          part.stage(v).template fetch_whole<S, N>(from, at, i);
        else
          part.stage(v).template fetch_elements<S, N>(from, at, i, int(call.classes));
      });
    __pipeline_commit();
  }
  __device__ __forceinline__ void fetch_even(const Tensor& from, int64_t at) const {
    if constexpr (kIsAny) {
      part.over_vectors_rolled(
          0, [&](int v, int i) { part.stage(v).template fetch_whole<S, N>(from, at, i); });
    } else {
      const S* data =
          reinterpret_cast<const S*>(from.data) + at + (part.first_vector() + part.thread) * N;
      char* to = part.stage(0).data;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (part.has(v)) __pipeline_memcpy_async(to, data, kAccess);
        to += part.threads * kAccess;
        data += part.threads * N;
      }
    }
  }
  __device__ __forceinline__ void fetch_teacher(int index, int m) const {
    const QueuedRow& row = queue.row(index);
    if (row.row < call.rows)
      fetch(of.teachers[m].tensor, shared.starts[index % kQueue][m], row.start.phase);
  }
  // What has no vector in any row is excluded classes for good, where one dtype lies in its place.
  __device__ __forceinline__ void fill_absent() const {
    for (int v = 0; v < V && !kIsAny; ++v)
      if (!part.has(v)) part.stage(v).template fetch_elements<S, N>(call.sides[kStudent], 0, 0, 0);
  }
  // Waits for the row that was sent for last.
  __device__ __forceinline__ void load(DType dtype, Held<S, N, V>& to) const {
    __pipeline_wait_prior(0);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      to.load(v, part.stage(v), dtype);
      if constexpr (kIsAny)
        if (!part.has(v)) to.exclude(v);
    }
  }
  // log2(e) / T, of logits as they are.
  __device__ __forceinline__ float rate() const {
    return rates.at_temperature * float(kLogitScale);
  }
  // Whether one instruction makes the exponents of all the warp's classes: none is excluded, and
  // no exponent is far from 0.
  __device__ __forceinline__ bool are_near(const Held<S, N, V>& x, float largest) const {
    constexpr float kMost = 0x1p22f;
    float smallest = largest;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (part.has(v)) smallest = fminf(smallest, x.smallest(v));
    const float farthest = fmaxf(fabsf(largest), fabsf(smallest));
    return __all_sync(kAllLanes, farthest <= FLT_MAX && farthest * rate() <= kMost);
  }
  // The exponentials of a teacher's classes.
  __device__ __forceinline__ PartialSum exponentials(const Held<S, N, V>& t, Classes& et) const {
    PartialSum own;
    own.maximum = warp_max(t.largest());
    if (are_near(t, own.maximum)) {
      const float origin = product(own.maximum, rate());
      own.rest = fmaf(own.maximum, rate(), -origin);
      of_each(t, et, [&](float x) { return exp2_of(fmaf(x, rate(), -origin)); });
    } else {
      const float top = shift(own.maximum);
      of_each(t, et, [&](float x) { return rates.of_teacher(shifted(x, top)); });
    }
#pragma unroll
    for (float e : et) own.sum += e;
    over_lanes_sum<kWarp>(own.sum);
    return own;
  }
  template <class F>
  __device__ __forceinline__ static void of_each(const Held<S, N, V>& held, Classes& to,
                                                 const F& f) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float x[N];
      held.widen_to(v, x);
#pragma unroll
      for (int k = 0; k < N; ++k) to[v * N + k] = f(x[k]);
    }
  }
  // What brings a part's exponentials to the maximum of all.
  __device__ __forceinline__ float moved(const PartialSum& from, float to) const {
    return from.maximum == -INFINITY
               ? 0
               : exp2_of(fmaf(shifted(from.maximum, shift(to)), rates.at_temperature, -from.rest));
  }
  // The sum of all warps' parts, in every thread; `step` counts such calls.
  __device__ __forceinline__ PartialSum merged(const PartialSum& own, int step) const {
    const int all = warps * share.blocks;
    const PartialSum* parts = shared.sums.messages[step % 2];
    if constexpr (kIsCluster) {
      if (part.thread == 0) shared.sums.expect(unsigned(all), step);
      if (lane < share.blocks)
        shared.sums.send(own, unsigned(part.rank() * warps + warp), unsigned(lane), step);
      parts = shared.sums.receive(step);
    } else {
      if (lane == 0) shared.sums.messages[step % 2][warp] = own;
      __syncthreads();
    }
    PartialSum found;
#pragma unroll 1
    for (int i = lane; i < all; i += kWarp) found.maximum = fmaxf(found.maximum, parts[i].maximum);
    found.maximum = warp_max(found.maximum);
#pragma unroll 1
    for (int i = lane; i < all; i += kWarp)
      found.sum += parts[i].sum * moved(parts[i], found.maximum);
    over_lanes_sum<kWarp>(found.sum);
    return found;
  }
  // Adds a teacher's probabilities, and sends for what follows it.
  __device__ __forceinline__ void add_teacher(int index, int m, Classes& p) const {
    Held<S, N, V> t;
    load(of.teachers[m].tensor.dtype, t);
    const QueuedRow& row = queue.row(index);
    if (m + 1 < of.count)
      fetch_teacher(index, m + 1);
    else
      fetch(call.sides[kStudent], row.start.at[kStudent], row.start.phase);
    Classes et;
    const PartialSum own = exponentials(t, et), all = merged(own, index * of.count + m);
    const float by = float(of.teachers[m].weight) / all.sum * moved(own, all.maximum);
#pragma unroll
    for (int j = 0; j < V * N; ++j) p[j] = fmaf(et[j], by, p[j]);
  }
};

}  // namespace fastkd::cuda::logits
