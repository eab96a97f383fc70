// One unit of a launch of attention: a part of a map, or of a sample's distance and slopes.
#pragma once

#include "attention_distance.h"
#include "attention_map.h"

namespace fastkd::cuda::maps {

// Of a launch: the tickets that were taken and the parts of samples whose slopes are there; and for
// each sample the units of its maps and of its sums that are done. The last block leaves them at 0.
enum Counter { kTicket, kFinalized, kOfSamples };
enum SampleCounter { kMapsDone, kSumsDone, kPerSample };

constexpr size_t counters_for(int64_t samples) { return size_t(kOfSamples + kPerSample * samples); }

struct Work {
  Stage stage;
  uint32_t sample, unit;
};

struct Shared {
  DistanceShared distance;
  double squares[kMapWarps][1];
  unsigned ticket;
  int job;
  Work work;
  UnitShared map;  // the last, for the sake of launches without bulk copies
};

constexpr size_t shared_bytes(bool has_bulk_copies) {
  return has_bulk_copies ? sizeof(Shared) : offsetof(Shared, map) + UnitShared::kLeastBytes;
}

template <class A>
struct Call {
  Transfer transfer;
  bool is_map;  // and no distance
  bool by_sample;
  double* losses;  // one a sample
  A* loss;
  bool adds;                // an earlier launch has put its part into the loss
  uint32_t samples, parts;  // of the launch
};

// By all threads, after what they have written.
__device__ __forceinline__ void count(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0) count_up(counter);
}

// By all threads, before what they read.
__device__ __forceinline__ void wait_for(const unsigned* counter, unsigned least) {
  if (threadIdx.x == 0) wait_until(counter, least);
  __syncthreads();
}

__device__ __forceinline__ Work work_of(const Pair& pair, uint32_t unit) {
  uint32_t slot, beyond;
  if (unit < pair.steady_begin) {
    slot = 0;
    beyond = pair.lag[kSlopes];
  } else if (unit < pair.steady_end) {
    slot = pair.lag[kSlopes] + (unit - pair.steady_begin) / pair.in_slot;
    beyond = slot + 1;
  } else {
    slot = pair.lag[kSlopes] < pair.batch ? pair.batch : 0;
    beyond = pair.batch + pair.lag[kSlopes];
  }
  while (beyond - slot > 1) {
    const uint32_t middle = (slot + beyond) / 2;
    (pair.units_before(middle) <= unit ? slot : beyond) = middle;
  }
  Work work{kStudentMap, 0, unit - pair.units_before(slot)};
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    const bool has = slot >= pair.lag[stage] && slot - pair.lag[stage] < pair.batch;
    const uint32_t units = has ? pair.units[stage] : 0;
    if (work.unit < units) {
      work.stage = Stage(stage);
      work.sample = slot - pair.lag[stage];
      break;
    }
    work.unit -= units;
  }
  return work;
}

template <class A, class Fold>
__device__ void map_unit(const Pair& pair, const Axis* axes, const Work& work, bool is_map,
                         const typename Fold::Raise& power, Shared& shared) {
  const int side = work.stage;
  const Pass& pass = pair.maps[side];
  const int64_t first = int64_t(work.sample) * pair.positions;
  A* const kept = reinterpret_cast<A*>(pair.slopes[side]) + first;
  int32_t* const argmax = pair.argmax[side];
  double squares[1] = {};
  fold_unit<A, Fold>(pass, axes, work.sample, work.unit, power, shared.map,
                     [&](uint32_t position, const Fold& fold) {
                       const A map = Fold::map(fold.value, power);
                       kept[position] = is_map ? map : fold.value;
                       if constexpr (Fold::kHasArgmax)
                         if (argmax != nullptr) argmax[first + position] = fold.channel;
                       squares[0] += double(map) * double(map);
                     });
  if (is_map) return;
  block_sums(squares, shared.squares);
  const uint32_t all = pair.units[kStudentMap] + pair.units[kTeacherMap];
  const uint32_t unit = work.unit + (side == 0 ? 0 : pair.units[kStudentMap]);
  if (threadIdx.x == 0) pair.squares[int64_t(work.sample) * all + unit] = squares[0];
}

// Sums of a part; and, where it is the only one, all that follows from them.
template <class A, class Fold>
__device__ void distance_unit(const Pair& pair, const Work& work, const Call<A>& call,
                              const typename Fold::Raise& power, DistanceShared& shared) {
  const SampleMaps<A, Fold> maps(pair, work.sample, call.transfer, shared);
  Meeting<A> meets{call.transfer.measure, A(call.transfer.order), A(0)};
  double* const parts = pair.sums + int64_t(work.sample) * pair.parts * kSumCount;
  double largest = 0;
  Sums sums{};
  if (work.stage == kSums) {
    if (meets.measure == Measure::any || meets.measure == Measure::infinity)
      largest = maps.largest(pair, work.unit, power, shared);
    meets.largest = A(largest);
    sums = maps.sums(pair, work.unit, power, meets, shared);
    if (pair.parts > 1) {
      if (threadIdx.x > 0) return;
      parts[work.unit * kSumCount] = sums.term;
      parts[work.unit * kSumCount + 1] = sums.student;
      parts[work.unit * kSumCount + 2] = sums.teacher;
      return;
    }
  } else {
#pragma unroll 1
    for (uint32_t part = 0; part < pair.parts; ++part) {
      sums.term += parts[part * kSumCount];
      sums.student += parts[part * kSumCount + 1];
      sums.teacher += parts[part * kSumCount + 2];
    }
  }
  const Outcome outcome(call.transfer, sums.term, largest, pair.positions);
  if (threadIdx.x == 0 && work.unit == 0) {
    const uint32_t sample = pair.first_sample + work.sample;
    call.losses[sample] = outcome.loss;
    if (call.by_sample) call.loss[sample] = A(outcome.loss);
  }
  maps.to_slopes(pair, work.unit, power, meets, sums, outcome.factor);
}

// Whether this block is the last of `all`, in every thread of it.
__device__ __forceinline__ bool is_last(unsigned* counter, uint32_t all, Shared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.ticket = count_up_and_tell(counter);
  __syncthreads();
  return shared.ticket == all - 1;
}

// By the last block that finds slopes.
template <class A>
__device__ __forceinline__ void finalize(unsigned* counters, const Call<A>& call, Shared& shared) {
  const uint32_t all = kOfSamples + kPerSample * call.samples;
  for (uint32_t i = threadIdx.x; i < all; i += kMapThreads) counters[i] = 0;
  if (call.by_sample) return;
  double total[1] = {};
#pragma unroll 1
  for (uint32_t sample = threadIdx.x; sample < call.samples; sample += kMapThreads)
    total[0] += call.losses[sample];
  block_sums(total, shared.squares);
  if (threadIdx.x == 0)
    *call.loss = A(total[0] * call.transfer.scale) + (call.adds ? *call.loss : A(0));
}

template <class A, class Fold>
__device__ __forceinline__ void do_work(const Pair& pair, const Axis* axes, const Work& work,
                                        const Call<A>& call, const typename Fold::Raise& power,
                                        unsigned* counters, Shared& shared) {
  const auto counters_of = [&](SampleCounter which) {
    return counters + kOfSamples + kPerSample * (pair.first_sample + work.sample) + which;
  };
  if (work.stage <= kTeacherMap) {
    map_unit<A, Fold>(pair, axes, work, call.is_map, power, shared);
    if (!call.is_map) count(counters_of(kMapsDone));
  } else {
    const bool are_sums = work.stage == kSums;
    wait_for(counters_of(are_sums ? kMapsDone : kSumsDone),
             are_sums ? pair.units[kStudentMap] + pair.units[kTeacherMap] : pair.parts);
    distance_unit<A, Fold>(pair, work, call, power, shared.distance);
    if (are_sums && pair.parts > 1) return count(counters_of(kSumsDone));
    if (is_last(counters + kFinalized, call.parts, shared)) finalize(counters, call, shared);
  }
}

}  // namespace fastkd::cuda::maps
