// Attention maps and attention transfer: all pairs of a call in one launch.
//
// A block processes one unit of work, whose number is the ticket that it takes when it starts. A
// unit waits for earlier tickets alone, and a block that holds one of those runs already. So nobody
// waits forever, however few blocks run at a time, and no block ever waits for all others.
#include <type_traits>

#include "attention_access.h"
#include "attention_distance.h"
#include "attention_plan.h"

namespace fastkd::cuda {

using namespace maps;

namespace {

// Of a launch: the tickets that were taken and the parts of samples whose slopes are there; and for
// each sample the units of its maps and of its sums that are done. The last block leaves them at 0.
__device__ unsigned counters_of_units[kAttentionCounters.all()];
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

template <class A, class Fold, class Table>
__global__ void __launch_bounds__(kMapThreads, blocks_together<Fold>(6))
    attention_forward_kernel(const __grid_constant__ Table table, const Call<A> call,
                             const typename Fold::Raise power, Tickets tickets) {
  Shared& shared = shared_memory<Shared>();
  unsigned* const counters = tickets.in(counters_of_units);
  if (threadIdx.x == 0) {
    const uint32_t unit = call.is_map ? blockIdx.x : atomicAdd(counters + kTicket, 1);
    int j = 0;
    while (unit >= table.jobs[j].last_unit) ++j;
    shared.job = j;
    shared.work = work_of(table.jobs[j], unit - table.jobs[j].first_unit);
  }
  __syncthreads();
  // Read again where it is needed, which leaves registers to the features.
  do_work<A, Fold>(table.jobs[shared.job], table.axes, shared.work, call, power, counters, shared);
}

Measure measure_of(const TransferParameters& p) {
  if (p.distance == Distance::mse) return Measure::mse;
  if (p.order == 1) return Measure::one;
  if (p.order == 2) return Measure::two;
  return std::isinf(p.order) ? Measure::infinity : Measure::any;
}

// How many samples later a stage comes, so that what it waits for is nearly always done: as many as
// the blocks that run at a time may be at work on.
void set_lags(Pair& pair, int64_t blocks) {
  pair.in_slot = 0;
  for (uint32_t units : pair.units) pair.in_slot += units;
  const uint32_t lag = std::min(parts_of(blocks, pair.in_slot), pair.batch);
  pair.lag[kSums] = pair.units[kSums] > 0 ? lag : 0;
  pair.lag[kSlopes] = pair.lag[kSums] + (pair.units[kSlopes] > 0);
  const bool is_steady = pair.lag[kSlopes] < pair.batch;
  pair.steady_begin = is_steady ? pair.units_before(pair.lag[kSlopes]) : 0;
  pair.steady_end = is_steady ? pair.units_before(pair.batch) : 0;
}

// Takes what a call needs out of one piece of memory.
class Arena {
 public:
  explicit Arena(void* memory) : begin_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 15) / 16 * 16;
    return begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + at);
  }
  size_t used() const { return used_; }

 private:
  char* begin_;
  size_t used_ = 0;
};

struct Workspace {
  std::vector<char*> teachers;  // maps that nobody keeps
  std::vector<double*> squares, sums;
  double* losses;
  unsigned* counters;
};

// Laid out by shapes alone.
Workspace lay_out(Arena& arena, const Tensors& slopes, size_t pairs) {
  Workspace w;
  int64_t samples = 0;
  for (size_t j = 0; j < pairs; ++j) {
    const int64_t batch = slopes[j].sizes[0], positions = slopes[j].sizes[1];
    samples += batch;
    if (slopes.size() == pairs)
      w.teachers.push_back(arena.take<char>(batch * positions * size_of(slopes[j].dtype)));
    w.squares.push_back(arena.take<double>(batch * 2 * (positions / kLeastPositions + 1)));
    w.sums.push_back(arena.take<double>(batch * (positions / kPart + 1) * kSumCount));
  }
  w.losses = arena.take<double>(samples);
  w.counters = arena.take<unsigned>(int64_t(counters_for(samples)));
  return w;
}

// What the driver translated for this chip knows no bulk copies.
bool has_bulk_copies(const Stream& stream) {
  using Fold = SumOf<float, Simple<float>>;
  return architecture_of(attention_forward_kernel<float, Fold, Few<Pair>>, stream) >=
         kFirstWithBulkCopies;
}

template <class Table>
bool copies_in_bulk(const Table& table) {
  return std::any_of(table.jobs, table.jobs + table.count, [](const Pair& pair) {
    return std::any_of(pair.maps, pair.maps + 2,
                       [](const Pass& map) { return map.access == Access::copied_rows; });
  });
}

template <class A, class Fold>
void launch_forward(const Plan<Pair>& unlagged, Call<A> call, double p, unsigned* own,
                    const Stream& stream) {
  with_tables<Fold>(unlagged, [&](auto& table, size_t begin) {
    using Table = std::remove_reference_t<decltype(table)>;
    constexpr auto kernel = attention_forward_kernel<A, Fold, Table>;
    Grid grid{1, kMapThreads, shared_bytes(copies_in_bulk(table))};
    const int64_t most = resident_clusters(kernel, grid, stream);
    const uint32_t first_sample = table.jobs[0].first_sample;
    Call<A> part = call;
    part.adds = begin > 0;
    for (int j = 0; j < table.count; ++j) {
      Pair& pair = table.jobs[j];
      set_lags(pair, most);
      pair.first_sample -= first_sample;
      part.samples += pair.batch;
      part.parts += pair.batch * pair.parts;
    }
    if (part.by_sample) part.loss += first_sample;
    grid.blocks = table.jobs[table.count - 1].last_unit;
    const Tickets counts =
        call.is_map ? Tickets{} : attention_counters.take(stream, own, counters_for(part.samples));
    launch(kernel, grid, stream, table, part, typename Fold::Raise(p), counts);
  });
}

template <class A>
void forward(const Plan<Pair>& plan, const Call<A>& call, const MapParameters& p, unsigned* own,
             const Stream& stream) {
  with_fold<A>(p, [&](auto* fold) {
    launch_forward<A, std::remove_pointer_t<decltype(fold)>>(plan, call, p.p, own, stream);
  });
}

}  // namespace

size_t attention_scratch_bytes(const Tensors& slopes, size_t pairs) {
  Arena arena(nullptr);
  lay_out(arena, slopes, pairs);
  return arena.used();
}

void attention_map_forward(const Place& place, const Tensor& features, const Tensor& raw,
                           const Tensor& argmax, const MapParameters& p) {
  if (features.sizes[0] == 0) return;
  const Stream stream(place);
  Plan<Pair> plan;
  Pair pair{};
  const Cut cut({features}, p.channel_dim, raw.dtype == DType::f64, has_bulk_copies(stream));
  pair.maps[0] = PassBuilder(features, Tensor{}, cut, plan.axes);
  pair.slopes[0] = raw.data;
  pair.argmax[0] = argmax.as<int32_t>();
  pair.batch = uint32_t(features.sizes[0]);
  pair.positions = pair.maps[0].positions;
  pair.units[kStudentMap] = pair.maps[0].units;
  plan.add(pair, uint64_t(pair.batch) * pair.maps[0].units);
  with_arithmetic(raw.dtype, [&](auto* arithmetic) {
    using A = std::remove_pointer_t<decltype(arithmetic)>;
    Call<A> call{};
    call.is_map = true;
    forward(plan, call, p, nullptr, stream);
  });
}

void attention_transfer_forward(const Place& place, const Tensors& students,
                                const Tensors& teachers, const Tensor& loss, const Tensors& slopes,
                                const Tensors& argmax, const Tensors&, const Tensor& scratch,
                                const TransferParameters& transfer, const MapParameters& p) {
  const Stream stream(place);
  const size_t pairs = students.size();
  const int64_t batch = students[0].sizes[0];
  if (batch == 0) {
    if (loss.numel() > 0)
      check(cudaMemsetAsync(loss.data, 0, size_t(size_of(loss.dtype)), stream.handle),
            "clearing the loss");
    return;
  }
  const Cut cut(students, p.channel_dim, loss.dtype == DType::f64, has_bulk_copies(stream));
  const Measure measure = measure_of(transfer);
  Arena arena(scratch.data);
  const Workspace workspace = lay_out(arena, slopes, pairs);
  Plan<Pair> plan;
  for (size_t j = 0; j < pairs; ++j) {
    Pair pair{};
    const Tensor* const sides[] = {&students[j], &teachers[j]};
    for (int side = 0; side < 2; ++side)
      pair.maps[side] = PassBuilder(*sides[side], Tensor{}, cut, plan.axes);
    pair.maps[1].is_once = true;
    pair.wants_teacher = slopes.size() > pairs;
    pair.slopes[0] = slopes[j].data;
    pair.slopes[1] = pair.wants_teacher ? slopes[pairs + j].data : workspace.teachers[j];
    pair.argmax[0] = argmax_of(argmax, j);
    pair.argmax[1] = pair.wants_teacher ? argmax_of(argmax, pairs + j) : nullptr;
    pair.squares = workspace.squares[j];
    pair.sums = workspace.sums[j];
    pair.batch = uint32_t(batch);
    pair.positions = pair.maps[0].positions;
    // An order for which the largest difference must be known first takes one block a sample.
    const bool takes_largest = measure == Measure::any || measure == Measure::infinity;
    pair.parts = takes_largest ? 1 : parts_of(pair.positions, kPart);
    pair.units[kStudentMap] = pair.maps[0].units;
    pair.units[kTeacherMap] = pair.maps[1].units;
    pair.units[kSums] = pair.parts;
    pair.units[kSlopes] = pair.parts > 1 ? pair.parts : 0;
    pair.first_sample = uint32_t(j * size_t(batch));
    uint64_t units = 0;
    for (uint32_t of_sample : pair.units) units += of_sample;
    plan.add(pair, units * pair.batch);
  }
  with_arithmetic(loss.dtype, [&](auto* arithmetic) {
    using A = std::remove_pointer_t<decltype(arithmetic)>;
    Call<A> call{};
    call.transfer = {measure, transfer.order, transfer.beta, transfer.sample_scale(batch), p.eps};
    call.by_sample = transfer.reduction == Reduction::none;
    call.losses = workspace.losses;
    call.loss = reinterpret_cast<A*>(loss.data);
    forward(plan, call, p, workspace.counters, stream);
  });
}

}  // namespace fastkd::cuda
