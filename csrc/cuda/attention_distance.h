// The distance between the two maps of a sample, and what it is to each position of them: the
// slopes. Map-sized work, by one block for a part of the positions.
//
// Of d = Q_S − Q_T at each position there is a term, which adds up to the distance, and u, which is
// the distance's derivative but for one factor for all of the sample.
#pragma once

#include "attention_jobs.h"
#include "attention_power.h"
#include "reduce.h"

namespace fastkd::cuda::maps {

constexpr int kMapWarps = kMapThreads / kWarp;
constexpr int kSumCount = 3;

enum class Measure : int { mse, one, two, any, infinity };

struct Transfer {
  Measure measure;
  double order, beta, scale, eps;  // scale: of a sample in the loss
};

struct DistanceShared {
  double squares[kMapWarps][2];
  double sums[kMapWarps][kSumCount];
  double largest[kMapWarps];
};

// One side of a sample: Q = map / norm, or map / eps where the norm is below that.
template <class A, class Fold>
struct Normalised {
  A* kept;
  A inverse;
  bool is_clamped;

  __device__ __forceinline__ Normalised(A* kept, double norm, double eps) : kept(kept) {
    is_clamped = norm < eps;
    inverse = norm == 0 ? A(0) : A(1 / (is_clamped ? eps : norm));
  }
  __device__ __forceinline__ A at(uint32_t i, const typename Fold::Raise& power) const {
    // Equal maps differ by 0, and the largest difference is found again.
    return product(Fold::map(kept[i], power), inverse);
  }
};

struct Sums {
  double term, student, teacher;  // Σ term, Σ Q_S · u, Σ Q_T · u
};

template <class A>
struct Meeting {
  Measure measure;
  A order, largest;

  __device__ __forceinline__ A ratio(A d) const { return magnitude(d) / largest; }
  __device__ __forceinline__ A term(A d) const {
    if (measure == Measure::one) return magnitude(d);
    if (measure == Measure::any) return power_of(ratio(d), order);
    if (measure == Measure::infinity) return A(magnitude(d) == largest);
    return d * d;
  }
  __device__ __forceinline__ A derivative(A d) const {
    if (measure == Measure::mse || measure == Measure::two) return d;
    if (d == A(0) || d != d) return d;
    if (measure == Measure::one) return with_sign(A(1), d);
    if (measure == Measure::any) return with_sign(power_of(ratio(d), order - A(1)), d);
    return magnitude(d) == largest ? with_sign(A(1), d) : A(0);
  }
};

// What a sample's sums make of it: its loss, and the factor of u.
struct Outcome {
  double loss, factor;

  __device__ Outcome(const Transfer& p, double sum, double largest, uint32_t positions) {
    const double weight = (p.measure == Measure::mse ? p.beta : p.beta / 2);
    double value = sum, derivative = 1;
    switch (p.measure) {
      case Measure::mse:
        value = sum / positions;
        derivative = 2.0 / positions;
        break;
      case Measure::one:
        break;
      case Measure::two:
        value = sqrt(sum);
        derivative = value == 0 ? 0 : 1 / value;
        break;
      case Measure::any:
        value = largest == 0 ? 0 : largest * pow(sum, 1 / p.order);
        derivative = largest == 0 ? 0 : pow(sum, 1 / p.order - 1);
        break;
      case Measure::infinity:
        value = largest;
        derivative = largest == 0 ? 0 : 1 / sum;
    }
    loss = weight * value;
    factor = weight * p.scale * derivative;
  }
};

__device__ __forceinline__ double larger(double a, double b) { return b > a || b != b ? b : a; }

__device__ __forceinline__ double block_largest(double x, double* warps) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    x = larger(x, __shfl_xor_sync(kAllLanes, x, lanes));
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int warp = 0; warp < kMapWarps; ++warp) x = larger(x, warps[warp]);
  return x;
}

// f(i) each of the part's positions that is this thread's.
template <class F>
__device__ __forceinline__ void over_part(const Pair& pair, uint32_t part, const F& f) {
  const uint32_t begin = part * kPart;
  const uint32_t end = part + 1 == pair.parts ? pair.positions : begin + kPart;
#pragma unroll 4
  for (uint32_t i = begin + threadIdx.x; i < end; i += kMapThreads) f(i);
}

// A sample of a pair, seen by one block.
template <class A, class Fold>
struct SampleMaps {
  using Raise = typename Fold::Raise;
  Normalised<A, Fold> student, teacher;

  __device__ SampleMaps(const Pair& pair, uint32_t sample, const Transfer& p,
                        DistanceShared& shared)
      : SampleMaps(pair, sample, p, norms(pair, sample, shared)) {}

  __device__ double largest(const Pair& pair, uint32_t part, const Raise& power,
                            DistanceShared& shared) const {
    double found = 0;
    over_part(pair, part, [&](uint32_t i) {
      found = larger(found, double(magnitude(student.at(i, power) - teacher.at(i, power))));
    });
    return block_largest(found, shared.largest);
  }

  __device__ Sums sums(const Pair& pair, uint32_t part, const Raise& power, const Meeting<A>& meets,
                       DistanceShared& shared) const {
    double found[kSumCount] = {};
    over_part(pair, part, [&](uint32_t i) {
      const A s = student.at(i, power), t = teacher.at(i, power);
      const A u = meets.derivative(s - t);
      found[0] += double(meets.term(s - t));
      found[1] += double(s) * double(u);
      found[2] += double(t) * double(u);
    });
    block_sums(found, shared.sums);
    return {found[0], found[1], found[2]};
  }

  // In the place of the maps: Q = F / ‖F‖ turns a slope of Q into (slope − Q · ⟨Q, slope⟩) / ‖F‖.
  __device__ void to_slopes(const Pair& pair, uint32_t part, const Raise& power,
                            const Meeting<A>& meets, const Sums& sums, double factor) const {
    const A c = A(factor);
    const A s_inner = student.is_clamped ? A(0) : A(sums.student);
    const A t_inner = teacher.is_clamped ? A(0) : A(sums.teacher);
    over_part(pair, part, [&](uint32_t i) {
      const A s = student.at(i, power), t = teacher.at(i, power);
      const A u = meets.derivative(s - t);
      const A s_slope = c * (u - s * s_inner) * student.inverse;
      const A t_slope = c * (t * t_inner - u) * teacher.inverse;
      student.kept[i] = Fold::slope(s_slope, student.kept[i], power);
      if (pair.wants_teacher) teacher.kept[i] = Fold::slope(t_slope, teacher.kept[i], power);
    });
  }

 private:
  struct Norms {
    double of[2];
  };

  __device__ SampleMaps(const Pair& pair, uint32_t sample, const Transfer& p, const Norms& norms)
      : student(kept(pair, sample, 0), norms.of[0], p.eps),
        teacher(kept(pair, sample, 1), norms.of[1], p.eps) {}

  __device__ static A* kept(const Pair& pair, uint32_t sample, int side) {
    return reinterpret_cast<A*>(pair.slopes[side]) + int64_t(sample) * pair.positions;
  }

  __device__ static Norms norms(const Pair& pair, uint32_t sample, DistanceShared& shared) {
    const uint32_t of_student = pair.units[kStudentMap];
    const uint32_t all = of_student + pair.units[kTeacherMap];
    const double* const squares = pair.squares + int64_t(sample) * all;
    double found[2] = {};
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < all; i += kMapThreads) {
      found[0] += i < of_student ? squares[i] : 0;
      found[1] += i < of_student ? 0 : squares[i];
    }
    block_sums(found, shared.squares);
    return {{sqrt(found[0]), sqrt(found[1])}};
  }
};

}  // namespace fastkd::cuda::maps
