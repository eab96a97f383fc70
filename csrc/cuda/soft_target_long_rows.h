// What the kernel of long rows keeps in registers and shared memory, and the blocks it is launched
// with.
#pragma once

#include <cfloat>

#include "cluster.h"
#include "packed.h"
#include "soft_target_exponents.h"
#include "soft_target_forms.h"
#include "soft_target_stage.h"

namespace fastkd::cuda::logits {

// The smallest of these that has room for a row is a row's, with few vectors a thread or else with
// most. A multiprocessor has one block of 512 threads, or two of 256.
constexpr Blocks kTeams[] = {{256, 1}, {512, 1}, {512, 2}, {512, 4}, {512, 8}, {512, 16}};
// 32 classes a thread, whose exponentials take 64 registers of 128, or 40.
template <class S>
constexpr int kFewVectors = 4;
template <class S>
constexpr int kMostVectors = 5;
template <>
constexpr int kFewVectors<float> = 8;
template <>
constexpr int kMostVectors<float> = 8;
// Where dtypes differ what they are takes registers.
template <>
constexpr int kFewVectors<Any> = 3;
template <>
constexpr int kMostVectors<Any> = 3;

// V vectors of one side, as they lie in shared memory.
template <class S, int N, int V>
struct Held {
  Vector<S, N> vectors[V];

  __device__ __forceinline__ void load(int v, const Stage& from, DType) {
    vectors[v] = cuda::load<N>(reinterpret_cast<const S*>(from.data));
  }
  __device__ __forceinline__ float largest() const { return largest_of(vectors); }
  __device__ __forceinline__ float smallest(int v) const { return smallest_of(vectors[v]); }
  __device__ __forceinline__ void widen_to(int v, float (&to)[N]) const {
    widen_all(vectors[v], to);
  }
};
template <int N, int V>
struct Held<Any, N, V> {
  float values[V * N];

  __device__ __forceinline__ void load(int v, const Stage& from, DType dtype) {
    from.load_to<Any, N>(dtype, values + v * N);
  }
  // Excluded classes, where there is no vector.
  __device__ __forceinline__ void exclude(int v) {
#pragma unroll
    for (int k = 0; k < N; ++k) values[v * N + k] = -INFINITY;
  }
  __device__ __forceinline__ float largest() const {
    float largest = values[0];
#pragma unroll
    for (float x : values) largest = fmaxf(largest, x);
    return largest;
  }
  __device__ __forceinline__ float smallest(int v) const {
    float smallest = INFINITY;
#pragma unroll
    for (int k = 0; k < N; ++k) smallest = fminf(smallest, values[v * N + k]);
    return smallest;
  }
  __device__ __forceinline__ void widen_to(int v, float (&to)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = values[v * N + k];
  }
};

// A row that a block is to compute, or the end: its number is then that of all rows.
struct QueuedRow {
  Start<> start;
  uint32_t row;
  int64_t label;
  float logit;  // the label's
  Weights<float> weights;
};
// The row that is computed, the next one, one more that is looked up; and a thread may still be
// busy with the one before.
constexpr int kQueue = 4;

// A row whose losses are to be computed.
struct FoundRow {
  RowState<float> state;
  uint32_t row;
  int64_t label;
  float logit;
  bool is_rounded;  // its origins are, see Exponents
};
// Those that a warp takes at a time. It reads them before it sends its sums of the next row, and
// nobody finds that row's state without these.
constexpr int kFound = kWarp;

struct LongShared {
  ClusterExchange<RowState<float>, kMostCluster * kMostWarps> parts;
  QueuedRow queue[kQueue];
  FoundRow found[kFound];
  float2 own_max[kMostWarps];  // the maxima of each warp's classes
  RowState<float> row;
  RowFactors<float> factors;
  bool is_served;  // by rounded units, see Exponents
  int repeats;     // of rows that were not
  double logits[kMostWarps];
  Weights<float> weights;
  Losses totals[kWarp];
  LossShared<kMostWarps> losses;
  double counted;
};

// Adds a class to sums, of its exponents on both sides; what becomes of it are its exponential and
// what is kept. A difference of exponents is held from below, or above, so that a class that both
// sides exclude, or the one that weighs, contributes 0.
template <class D>
__device__ __forceinline__ void add_exponents(RowState<float>& row, float x, float y, float& es,
                                              float& kept) {
  constexpr float kFar = 3e38f;
  const float et = exp2_of(y), apart = D::kByTeacher ? fmaxf(y - x, -kFar) : fminf(y - x, kFar);
  es = exp2_of(x);
  kept = D::kept(es, et, apart);
  row.student += es;
  row.teacher += et;
  row.difference += D::term(es, kept, apart);
}

}  // namespace fastkd::cuda::logits
