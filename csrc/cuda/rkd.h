// What both losses of relational distillation share.
#pragma once

#include "relations.h"

namespace fastkd::cuda::rkd {

// Squared ones, of the student and of the teacher.
struct Distances {
  const double* squares[2];
  int64_t count;

  Distances(const Tensor& student, const Tensor& teacher)
      : squares{reinterpret_cast<const double*>(student.data),
                reinterpret_cast<const double*>(teacher.data)},
        count(student.numel()) {}
};

// Sum and number of the distances that are not 0, of both sides.
struct Totals {
  double sum[2];
  double count[2];

  // What distances are relative to; without any, they are 0 all the same.
  __device__ double mean(int side) const { return count[side] == 0 ? 1 : sum[side] / count[side]; }
};

struct Scratch {
  double counter;
  double through_mean;
  Totals totals;
  double partial[4 * kMostBlocks];
};
static_assert(sizeof(Scratch) == rkd_scratch_bytes());

// Finds the totals, in the scratch.
void find_totals(const Distances& distances, Scratch& scratch, const Stream& stream);

inline Tickets tickets(Scratch& scratch, const Stream& stream) {
  return grid_counters.take(stream, reinterpret_cast<unsigned*>(&scratch.counter));
}

// Huber's loss, and its derivative, from which it is computed. NaN stays NaN.
template <class A>
__device__ __forceinline__ A huber_slope(A x, A delta) {
  return fabs(x) > delta ? copysign(delta, x) : x;
}
template <class A>
__device__ __forceinline__ A huber(A x, A slope) {
  return slope * (x - slope / 2);
}

}  // namespace fastkd::cuda::rkd
