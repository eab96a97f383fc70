// Attention maps and attention transfer: all pairs of a call in one launch.
//
// A block processes one unit of work, whose number is the ticket that it takes when it starts. A
// unit waits for earlier tickets alone, and a block that holds one of those runs already. So nobody
// waits forever, however few blocks run at a time, and no block ever waits for all others.
#include <type_traits>

#include "attention_plan.h"
#include "attention_work.h"

namespace fastkd::cuda {

using namespace maps;

namespace {

__device__ unsigned counters_of_units[kAttentionCounters.all()];

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
