// Soft targets and hard labels: a call as its kernels see it, and where its rows are.
#pragma once

#include "../row.h"
#include "reduce.h"
#include "storage.h"

namespace fastkd::cuda {

namespace logits {

enum Side { kStudent, kTeacher, kToStudent, kToTeacher, kSides };

struct Tensor {
  char* data;  // the gradients may be absent
  DType dtype;
  int64_t class_stride;  // in elements, like all strides
};

struct Axis {
  uint32_t size;
  int64_t stride[kSides];
};

// Rows are the indices along the axes, in C order. They are counted in 32 bits, which divide many
// times as fast as 64.
struct Call {
  Tensor sides[kSides];
  int64_t classes;
  double share;     // of each class, in an even distribution
  bool is_dense;    // a row's classes are contiguous in every tensor,
  bool is_aligned;  // and every row begins where an access of 16 bytes may
  bool is_double;   // a tensor is of float64, and so is the arithmetic
  bool has_hard;    // temperature 1 has exponentials of its own
  uint32_t rows;
  int axes;
  Axis axis[kMaxDims];
  const int64_t* labels;  // one a row, or absent
  int64_t ignore_index;
  Reduction reduction;
  Divergence divergence;
  double temperature, soft_weight, hard_weight, smoothing;
  float rate;      // log2(e) / T, of scaled logits
  double inverse;  // makes a divergence of a row's difference: 1 / T, as the arithmetic has it

  void* loss;                         // absent in a backward call
  void* parts;                        // of the loss, (hard, T² divergence), or absent
  void* statistics;                   // or absent
  double* partial;                    // (divergence, cross-entropy) of each block
  const unsigned long long* counted;  // rows that count, where an earlier kernel found them

  const void* grad_output;  // of the losses of rows: one number, or one a row; absent for 1
  const void* in_place;     // or absent: a number, for which the gradient is there where it is 1

  int64_t all_classes;  // of a shard, those of all shards; 0 where the tensors have all

  constexpr bool is_backward() const { return loss == nullptr; }
  // Whether the losses of rows are added up.
  constexpr bool sums_losses() const { return reduction != Reduction::none && !is_backward(); }
  constexpr bool smooths() const { return smoothing > 0 && labels != nullptr; }
};

template <class A>
__device__ __forceinline__ bool is_there(const Call& call) {
  return call.in_place != nullptr && *static_cast<const A*>(call.in_place) == A(1);
}

// exp2, within 2 ulp; what would leave float's normal range is 0.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0 : std::exp2(x);
#endif
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

constexpr double kLog2E = 1.4426950408889634;

// A logit less the maximum, scaled.
template <class A>
__device__ __forceinline__ A shifted(A logit, A shift) {
  return logit * A(kLogitScale) - shift;
}

// Exponentials at the temperature and at temperature 1, of scaled logits relative to a maximum.
template <class A>
struct Rates {
  A at_temperature, at_one;  // log2(e) / T and log2(e), of scaled logits
  bool has_hard;

  __device__ explicit Rates(const Call& call)
      : at_temperature(sizeof(A) == 8 ? A(kLog2E / call.temperature / kLogitScale) : A(call.rate)),
        at_one(A(kLog2E / kLogitScale)),
        has_hard(call.has_hard) {}

  __device__ __forceinline__ A exp_soft(A x) const { return exp2_of(x * at_temperature); }
  __device__ __forceinline__ A exp_hard(A x) const { return exp2_of(x * at_one); }

  // What brings such exponentials from one maximum to another.
  __device__ __forceinline__ A soft(A from, A to) const { return moving(from, to, at_temperature); }
  __device__ __forceinline__ A teacher(A from, A to) const { return soft(from, to); }
  __device__ __forceinline__ A hard(A from, A to) const { return moving(from, to, at_one); }
  __device__ __forceinline__ static A origin(A maximum) { return shift(maximum); }
  __device__ __forceinline__ static A at_student(A apart) { return apart; }

 private:
  __device__ __forceinline__ static A moving(A from, A to, A rate) {
    return from == to             ? A(1)
           : from == A(-INFINITY) ? A(0)
                                  : exp2_of(shifted(from, to * A(kLogitScale)) * rate);
  }
};

// The class of a row's label, or what there is in its place.
constexpr int64_t kNoLabels = -1, kWrongLabel = -2, kOtherShard = -3;

__device__ __forceinline__ int64_t label_of(const Call& call, uint32_t row) {
  if (call.labels == nullptr) return kNoLabels;
  const int64_t label = call.labels[row];
  return label >= 0 && label < call.classes ? label : kWrongLabel;
}

// The same of what may be a shard of the classes.
__device__ __forceinline__ int64_t label_in_shard(const Call& call, uint32_t row) {
  const int64_t label = label_of(call, row);
  const bool is_wrong = label == kWrongLabel;
  return is_wrong && call.all_classes != 0 && call.labels[row] == kElsewhere ? kOtherShard : label;
}

__device__ __forceinline__ bool ignores(const Call& call, uint32_t row) {
  return call.labels != nullptr && call.labels[row] == call.ignore_index;
}

// Where the elements of a row begin.
template <int N>
__device__ __forceinline__ void locate(const Call& call, uint32_t row, int64_t (&at)[N]) {
#pragma unroll
  for (int side = 0; side < N; ++side) at[side] = 0;
#pragma unroll 1
  for (int a = call.axes - 1; a >= 0; --a) {
    const Axis& axis = call.axis[a];
    const uint32_t outer = a == 0 ? 0 : row / axis.size, i = row - outer * axis.size;
#pragma unroll
    for (int side = 0; side < N; ++side) at[side] += i * axis.stride[side];
    row = outer;
  }
}

// What a block of up to so many warps needs to count rows and to add up losses.
template <int kWarps>
struct LossShared {
  double counts[kWarps][1];
  SharedSums<2, kWarps> sums;
};

// The rows that count, in every thread of the block.
template <int kWarps>
__device__ __forceinline__ double counted_rows(const Call& call, LossShared<kWarps>& shared) {
  if (call.labels == nullptr) return call.rows;
  if (call.counted != nullptr) return double(*call.counted);
  unsigned counted = 0;
#pragma unroll 4
  for (uint32_t row = threadIdx.x; row < call.rows; row += blockDim.x)
    counted += !ignores(call, row);
  double sum[1] = {double(counted)};
  block_sums(sum, shared.counts);
  return sum[0];
}

__device__ __forceinline__ double divisor_of(const Call& call, double counted) {
  const double divisor = call.reduction == Reduction::batchmean ? counted
                         : call.reduction == Reduction::mean    ? counted * double(call.classes)
                                                                : 1;
  return divisor > 0 ? divisor : 1;
}

}  // namespace logits
}  // namespace fastkd::cuda
