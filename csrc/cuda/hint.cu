// Hints: difference, square, sum and gradient in one pass over all pairs of a call.
#include <algorithm>
#include <type_traits>

#include "hint_access.h"
#include "reduce.h"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksTogether = 5;  // on a multiprocessor: 102 registers are left to a thread

struct Shared {
  Square squares[kWarps];
  SharedSums<1, kWarps> sums;
};

// What every job of a launch has in common. grad_output is 1 where it is absent; the loss is absent
// in backward.
template <class A>
struct Call {
  bool by_row;
  const A* grad_output;
  A* loss;
  double* partial;
};

// Processes this warp's units of a job, from `unit` on, each by process(offsets, width, length,
// factor).
// Returns the weighted sum of their squares, unless rows are summed apart.
template <class A, class Process>
__device__ __forceinline__ double do_units(const Job& job, const Axis* axes, const Call<A>& call,
                                           uint32_t& unit, const Process& process) {
  double total = 0;
  for (; unit < job.last_unit; unit += gridDim.x * kWarps) {
    const uint32_t index = unit - job.first_unit;
    const uint32_t row = index / job.units_per_row, in_row = index - row * job.units_per_row;
    uint32_t plane = in_row / job.units_per_plane;
    const uint32_t in_plane = in_row - plane * job.units_per_plane;
    const uint32_t across = in_plane / job.units_per_length;
    const int64_t w = int64_t(across) * job.unit_width;
    const int64_t l = int64_t(in_plane - across * job.units_per_length) * job.unit_length;
    int64_t offset[kSides];
#pragma unroll
    for (int t = 0; t < kSides; ++t)
      offset[t] = row * job.row.stride[t] + w * job.width.stride[t] + l * job.length.stride[t];
    for (int a = job.axes - 1; a >= 0; --a) {
      const Axis& axis = axes[job.first_axis + a];
      const uint32_t outer = plane / uint32_t(axis.size), i = plane - outer * uint32_t(axis.size);
#pragma unroll
      for (int t = 0; t < kSides; ++t) offset[t] += i * axis.stride[t];
      plane = outer;
    }
    const int64_t place = call.by_row ? job.first_row + row : 0;
    const double upstream = call.grad_output == nullptr ? 1 : double(call.grad_output[place]);
    const int64_t width = job.width.size - w, length = job.length.size - l;
    const double sum = double(process(offset, int(width < job.unit_width ? width : job.unit_width),
                                      int(length < job.unit_length ? length : job.unit_length),
                                      A(job.coefficient * upstream)));
    if (!call.by_row) {
      total += sum;
    } else if (call.loss != nullptr) {
      const double of_warp = job.weight * warp_sum(sum);
      if (threadIdx.x % kWarp != 0) continue;
      if (job.units_per_row == 1)
        call.loss[place] = A(of_warp);
      else
        call.partial[unit] = of_warp;
    }
  }
  return job.weight * total;
}

template <class S>
__device__ Elements<S> elements(const Job& job, Side side, int64_t offset) {
  return {job.data[side], job.dtype[side == kTeacher], offset};
}

template <class S, class T, class A>
__device__ __forceinline__ double do_job(const Job& job, const Axis* axes, const Call<A>& call,
                                         uint32_t& unit, Square& square) {
  using Offsets = const int64_t (&)[kSides];
  if constexpr (!std::is_same_v<S, Any>) {
    if (job.access == Access::vectors)
      return do_units(job, axes, call, unit, [&](Offsets offset, int, int length, float factor) {
        return along_vectors(elements<S>(job, kStudent, offset[kStudent]).data,
                             elements<T>(job, kTeacher, offset[kTeacher]).data,
                             elements<S>(job, kGradient, offset[kGradient]).data, length, factor);
      });
    if (job.access == Access::transposed)
      return do_units(job, axes, call, unit,
                      [&](Offsets offset, int width, int length, float factor) {
                        return across_square(elements<S>(job, kStudent, offset[kStudent]).data,
                                             elements<T>(job, kTeacher, offset[kTeacher]).data,
                                             elements<S>(job, kGradient, offset[kGradient]).data,
                                             job, width, length, factor, square);
                      });
  }
  return do_units(job, axes, call, unit, [&](Offsets offset, int width, int length, A factor) {
    return over_elements<A>(
        elements<S>(job, kStudent, offset[kStudent]), elements<T>(job, kTeacher, offset[kTeacher]),
        elements<S>(job, kGradient, offset[kGradient]), job, width, length, factor);
  });
}

// One warp a unit. `adds` says that an earlier launch has put its part into the loss.
template <class S, class T, class A, class Table>
__global__ void __launch_bounds__(kThreads, kBlocksTogether)
    hint_kernel(const __grid_constant__ Table table, const Call<A> call, bool in_place,
                Tickets tickets, bool adds) {
  if (in_place && *call.grad_output == A(1)) return;
  Shared& shared = shared_memory<Shared>();
  const int warp = threadIdx.x / kWarp;
  uint32_t unit = blockIdx.x * kWarps + warp;
  double total = 0;
  for (int j = 0; j < table.count; ++j)
    total += do_job<S, T>(table.jobs[j], table.axes, call, unit, shared.squares[warp]);
  if (call.by_row || call.loss == nullptr) return;
  double sums[1] = {total};
  if (grid_sums(sums, call.partial, tickets, shared.sums) && threadIdx.x == 0)
    *call.loss = A(sums[0]) + (adds ? *call.loss : A(0));
}

// The losses of rows that were several units: one warp a row, of all jobs.
template <class A, class Table>
__global__ void __launch_bounds__(kThreads)
    hint_rows_kernel(const __grid_constant__ Table table, const double* partial, A* loss) {
  int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  for (int j = 0; j < table.count; ++j) {
    const Job& job = table.jobs[j];
    if (row < job.row.size) {
      if (job.units_per_row == 1) return;
      const double* units = partial + job.first_unit + row * int64_t(job.units_per_row);
      double total = 0;
      for (uint32_t i = lane; i < job.units_per_row; i += kWarp) total += units[i];
      total = warp_sum(total);
      if (lane == 0) loss[job.first_row + row] = A(total);
      return;
    }
    row -= job.row.size;
  }
}

template <class S, class T, class A, class Table>
void launch_jobs(const Table& table, const Call<A>& call, bool in_place, unsigned* counter,
                 bool adds, const Stream& stream) {
  constexpr auto kernel = hint_kernel<S, T, A, Table>;
  const int64_t units = table.jobs[table.count - 1].last_unit;
  Grid grid{1, kThreads, sizeof(Shared)};
  grid.blocks = std::min(
      {(units + kWarps - 1) / kWarps, resident_clusters(kernel, grid, stream), kMostBlocks});
  const bool sums = call.loss != nullptr && !call.by_row;
  launch(kernel, grid, stream, table, call, in_place,
         sums ? grid_counters.take(stream, counter) : Tickets{}, adds);
  int64_t rows = 0;
  bool are_split = false;
  for (int j = 0; j < table.count; ++j) {
    rows += table.jobs[j].row.size;
    are_split = are_split || table.jobs[j].units_per_row > 1;
  }
  if (call.loss != nullptr && call.by_row && are_split)
    launch(hint_rows_kernel<A, Table>, {(rows + kWarps - 1) / kWarps, kThreads}, stream, table,
           call.partial, call.loss);
}

// Launches a plan, as often as its jobs fill a table.
template <class S, class T, class Table, class A>
void launch_plan(const Plan& plan, Call<A> call, bool in_place, unsigned* counter,
                 const Stream& stream) {
  double* const partial = call.partial;
  for (size_t next = 0; next < plan.jobs.size();) {
    const size_t begin = next;
    const int first_axis = plan.jobs[begin].first_axis;
    const uint32_t first_unit = plan.jobs[begin].first_unit;
    Table table;
    table.count = 0;
    for (; next < plan.jobs.size() && table.count < Table::kJobs; ++next) {
      Job job = plan.jobs[next];
      job.first_axis -= first_axis;
      if (job.first_axis + job.axes > Table::kAxes) break;
      job.first_unit -= first_unit;
      job.last_unit -= first_unit;
      for (int a = 0; a < job.axes; ++a)
        table.axes[job.first_axis + a] = plan.axes[size_t(plan.jobs[next].first_axis + a)];
      table.jobs[table.count++] = job;
    }
    if (call.by_row && partial != nullptr) call.partial = partial + first_unit;
    launch_jobs<S, T>(table, call, in_place, counter, begin > 0, stream);
  }
}

// Most calls fit the small table; a parameter of 30 KB takes longer to hand over.
using Few = Table<4, 12>;
using Many = Table<64, 384>;
static_assert(sizeof(Many) < 32000 && Many::kAxes >= kMaxDims);

template <class S, class T, class A>
void launch_typed(const Plan& plan, const Tensor& grad_output, bool in_place, const Tensor& loss,
                  void* scratch, const Stream& stream) {
  const Call<A> call{plan.by_row, reinterpret_cast<const A*>(grad_output.data),
                     reinterpret_cast<A*>(loss.data),
                     scratch == nullptr ? nullptr : static_cast<double*>(scratch) + 1};
  unsigned* const counter = static_cast<unsigned*>(scratch);
  const bool few = plan.jobs.size() <= Few::kJobs && plan.axes.size() <= Few::kAxes;
  (few ? launch_plan<S, T, Few, A> : launch_plan<S, T, Many, A>)(plan, call, in_place, counter,
                                                                 stream);
}

void launch(const Plan& plan, const Tensor& grad_output, bool in_place, const Tensor& loss,
            void* scratch, const Stream& stream) {
  if (plan.jobs.empty()) return;
  if (!plan.is_uniform)
    return (plan.arithmetic == DType::f64 ? launch_typed<Any, Any, double>
                                          : launch_typed<Any, Any, float>)(plan, grad_output,
                                                                           in_place, loss, scratch,
                                                                           stream);
  with_storage(plan.jobs[0].dtype[0], [&](auto* one) {
    with_storage(plan.jobs[0].dtype[1], [&](auto* other) {
      using S = std::remove_pointer_t<decltype(one)>;
      using T = std::remove_pointer_t<decltype(other)>;
      launch_typed<S, T, float>(plan, grad_output, in_place, loss, scratch, stream);
    });
  });
}

Plan forward_plan(const Tensors& students, const Tensors& teachers, const Tensors& gradients,
                  DType arithmetic, const HintParameters& p) {
  Plan plan(students, teachers, arithmetic, p.reduction == Reduction::none);
  for (size_t j = 0; j < students.size(); ++j) {
    const double divisor = divisor_of(students[j], p.reduction);
    plan.add(students[j], teachers[j], gradients.empty() ? Tensor{} : gradients[j],
             int64_t(j) * students[j].sizes[0], p.scale / divisor, 2 * p.scale / divisor);
  }
  return plan;
}

}  // namespace

size_t hint_rows_scratch_bytes(const Tensors& students, const Tensors& teachers, const Tensor& loss,
                               const Tensors& gradients) {
  const Plan plan = forward_plan(students, teachers, gradients, loss.dtype, {1, Reduction::none});
  return sizeof(double) * (size_t(plan.units()) + 1);
}

void hint_forward(const Place& place, const Tensors& students, const Tensors& teachers,
                  const Tensor& loss, const Tensors& gradients, const Tensor& scratch,
                  const HintParameters& p) {
  const Stream stream(place);
  const Plan plan = forward_plan(students, teachers, gradients, loss.dtype, p);
  bool is_any_empty = false;
  for (const Tensor& student : students) is_any_empty = is_any_empty || student.numel() == 0;
  if (is_any_empty && loss.numel() > 0)
    check(cudaMemsetAsync(loss.data, 0, size_t(loss.numel() * size_of(loss.dtype)), stream.handle),
          "clearing the loss");
  launch(plan, Tensor{}, false, loss, scratch.data, stream);
}

void hint_backward(const Place& place, const Tensor& grad_output, const Tensors& students,
                   const Tensors& teachers, const Tensors& gradients, const HintParameters& p,
                   bool in_place) {
  const size_t pairs = students.size();
  const auto add = [&](Plan& plan, const Tensor& one, const Tensor& other, size_t i) {
    const size_t j = i % pairs;
    if (i < gradients.size() && gradients[i])
      plan.add(one, other, gradients[i], int64_t(j) * one.sizes[0], 0,
               2 * p.scale / divisor_of(one, p.reduction));
  };
  Plan to_students(students, teachers, grad_output.dtype, grad_output.ndim > 0);
  Plan to_teachers(teachers, students, grad_output.dtype, grad_output.ndim > 0);
  for (size_t j = 0; j < pairs; ++j) {
    add(to_students, students[j], teachers[j], j);
    add(to_teachers, teachers[j], students[j], pairs + j);
  }
  const Stream stream(place);
  launch(to_students, grad_output, in_place, Tensor{}, nullptr, stream);
  launch(to_teachers, grad_output, in_place, Tensor{}, nullptr, stream);
}

}  // namespace fastkd::cuda
