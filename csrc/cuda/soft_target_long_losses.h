// What the kernels of long rows do before their first row and after their last one, and with the
// losses: the logarithms of 32 rows are a warp's, a lane each.
#pragma once

#include "soft_target_long_part.h"

namespace fastkd::cuda::logits {

template <class RowPart>
struct LongLosses {
  const RowPart& part;
  LongShared& shared;
  const Call& call = part.call;

  // One warp of a row's blocks has them.
  __device__ __forceinline__ bool are_here() const {
    return part.rank() == 0 && part.warp == 2 % part.warps;
  }

  // Before the first row.
  template <class Queue>
  __device__ __forceinline__ void open(const Queue& queue) const {
    const double counted = counted_rows(call, shared.losses);
    const Weights<float> weights(call, divisor_of(call, counted), 1);
    if (part.thread == 0) {
      shared.counted = counted;
      shared.weights = weights;
      shared.repeats = 0;
    }
    if (part.thread < kWarp) shared.totals[part.thread] = {0, 0};
    __syncthreads();
#pragma unroll 1
    for (int index = 0; index < 2; ++index) {
      queue.look_ahead(index);
      __syncwarp();
    }
    __syncthreads();
  }

  // Of the last `count` rows that were found, of which `found` there are.
  template <class D>
  __device__ __forceinline__ void write(int found, int count) const {
    if (!are_here() || part.lane >= count) return;
    const FoundRow& of = shared.found[(found - count + part.lane) % kFound];
    const RowState<double> state = Exponents(call, of.is_rounded).template exact<D>(of.state);
    const RowState<float> kept{float(state.student_max),
                               float(state.teacher_max),
                               float(state.student),
                               float(state.teacher),
                               float(state.hard),
                               float(state.difference),
                               state.logits};
    write_row(call, of.row, kept,
              losses_of<D>(state, Rates<double>(call), call, of.label, of.logit),
              shared.totals[part.lane]);
  }

  // After the last row.
  __device__ __forceinline__ void close(const Tickets& tickets) const {
    write_loss<float>(call, are_here() ? over_warp(shared.totals[part.lane]) : Losses{},
                      shared.counted, tickets, shared.losses);
  }
};

}  // namespace fastkd::cuda::logits
