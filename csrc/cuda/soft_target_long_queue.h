// The rows that a block is to compute, looked up by one of its warps ahead of time.
#pragma once

#include "soft_target_long_rows.h"

namespace fastkd::cuda::logits {

// Of a student of S. Starts finds where a row is, in a queue's place.
template <class S, class Starts>
struct Queue {
  const Call& call;
  const Share& share;
  LongShared& shared;
  const Starts starts;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;

  __device__ __forceinline__ const QueuedRow& row(int index) const {
    return shared.queue[index % kQueue];
  }

  // By one warp: the team's next row that counts, after row number `index - 1` of those that do,
  // goes into the queue. The lanes look at the labels of 32 rows at a time.
  __device__ __forceinline__ void enqueue(int index) const {
    QueuedRow& to = shared.queue[index % kQueue];
    uint32_t row = index == 0 ? blockIdx.x / unsigned(share.blocks)
                              : row_after(shared.queue[(index + kQueue - 1) % kQueue].row);
    if (shared.counted < call.rows) row = first_that_counts(row);
    if (lane == 0) to.row = row;
    if (row == call.rows) return;
    if (lane == 0) {
      to.label = label_of(call, row);
      to.weights = shared.weights.times(grad_output_of<float>(call, row));
    }
    starts.find(row, index % kQueue, to.start);
  }
  __device__ __forceinline__ uint32_t row_after(uint32_t row) const {
    return call.rows - row > share.teams ? row + share.teams : call.rows;
  }
  __device__ __forceinline__ uint32_t first_that_counts(uint32_t row) const {
    while (row < call.rows) {
      const uint64_t own = row + uint64_t(lane) * share.teams;
      const unsigned found =
          __ballot_sync(kAllLanes, own < call.rows && !ignores(call, uint32_t(own)));
      const uint64_t next =
          row + uint64_t(found == 0 ? kWarp : __ffs(int(found)) - 1) * share.teams;
      row = next < call.rows ? uint32_t(next) : call.rows;
      if (found != 0) break;
    }
    return row;
  }
  // A round later, when the label has come from memory.
  __device__ __forceinline__ void look_up_logit(int index) const {
    QueuedRow& of = shared.queue[index % kQueue];
    if (lane == 0 && of.row < call.rows && call.labels != nullptr)
      of.logit = float(logit_of<S>(call, of.start.at[kStudent], of.label));
  }
  __device__ __forceinline__ void look_ahead(int index) const {
    if (warp != 1 % warps) return;
    if (index > 0) look_up_logit(index - 1);
    enqueue(index);
  }
  // f(row), for those of the team's rows that do not count.
  template <class F>
  __device__ __forceinline__ void over_ignored_rows(const F& f) const {
    for (uint64_t first = blockIdx.x / unsigned(share.blocks); first < call.rows;
         first += uint64_t(kWarp) * share.teams) {
      const uint64_t own = first + uint64_t(lane) * share.teams;
      unsigned ignored = __ballot_sync(kAllLanes, own < call.rows && ignores(call, uint32_t(own)));
      for (; ignored != 0; ignored &= ignored - 1)
        f(uint32_t(first + uint64_t(__ffs(int(ignored)) - 1) * share.teams));
    }
  }
};

}  // namespace fastkd::cuda::logits
