// What kernels write of losses and statistics.
#pragma once

#include "soft_target.h"

namespace fastkd::cuda::logits {

// The loss of a row, or of all. Weighted it may be representable where its terms are not.
template <class A>
__device__ __forceinline__ A loss_of(const Call& call, const Losses& losses) {
  return A((weighted(call.soft_weight, losses.divergence) +
            weighted(call.hard_weight, losses.cross_entropy)) /
           kLogitScale);
}

// The parts of a loss, the second of them `second` elements after the first.
template <class A>
__device__ void write_parts(const Call& call, int64_t at, int64_t second, const Losses& losses) {
  if (call.parts == nullptr) return;
  A* const to = static_cast<A*>(call.parts) + at;
  to[0] = A(losses.cross_entropy / kLogitScale);
  to[second] = A(weighted(call.temperature * call.temperature, losses.divergence) / kLogitScale);
}

// Writes the losses of one row, where each has its own, and adds them to those of the thread's
// other rows.
template <class A>
__device__ void write_losses(const Call& call, uint32_t row, const Losses& losses, Losses& total) {
  total.divergence += losses.divergence;
  total.cross_entropy += losses.cross_entropy;
  if (call.reduction != Reduction::none || call.loss == nullptr) return;
  static_cast<A*>(call.loss)[row] = loss_of<A>(call, losses);
  write_parts<A>(call, row, call.rows, losses);
}

// `hard` is the sum of exponentials at temperature 1.
template <class A>
__device__ void write_statistics(const Call& call, uint32_t row, const RowState<A>& state, A hard,
                                 const Losses& losses) {
  if (call.statistics == nullptr) return;
  A* to = static_cast<A*>(call.statistics) + int64_t(row) * kCount;
  to[kStudentMax] = state.student_max;
  to[kStudentSum] = state.student;
  to[kTeacherMax] = state.teacher_max;
  to[kTeacherSum] = state.teacher;
  to[kHardSum] = hard;
  to[kKl] = A(losses.divergence);
  to[kCe] = A(losses.cross_entropy);
}

// Both. Statistics are not kept of several teachers.
template <class A>
__device__ void write_row(const Call& call, uint32_t row, const RowState<A>& state,
                          const Losses& losses, Losses& total) {
  write_losses<A>(call, row, losses, total);
  write_statistics(call, row, state, call.temperature == 1 ? state.student : state.hard, losses);
}
template <class A>
__device__ void write_ignored_row(const Call& call, uint32_t row) {
  Losses total;
  write_row(call, row, RowState<A>{0, 0}, Losses{}, total);
}

__device__ __forceinline__ Losses over_warp(const Losses& x) {
  return {warp_sum(x.divergence), warp_sum(x.cross_entropy)};
}

// Adds up what lane 0 of each warp of all blocks has found, and writes the loss and its parts: the
// last block, found by a ticket counter, adds the blocks' partial sums in a fixed order.
template <class A, int kWarps>
__device__ void write_loss(const Call& call, const Losses& of_warp, double counted,
                           const Tickets& tickets, LossShared<kWarps>& shared) {
  if (!call.sums_losses()) return;
  double sums[] = {of_warp.divergence, of_warp.cross_entropy};
  if (!grid_sums_of_warps(sums, call.partial, tickets, shared.sums) || threadIdx.x != 0) return;
  const double divisor = divisor_of(call, counted);
  const Losses total{sums[0] / divisor, sums[1] / divisor};
  *static_cast<A*>(call.loss) = loss_of<A>(call, total);
  write_parts<A>(call, 0, 1, total);
  if (call.statistics != nullptr)
    static_cast<A*>(call.statistics)[int64_t(call.rows) * kCount] = A(counted);
}

}  // namespace fastkd::cuda::logits
