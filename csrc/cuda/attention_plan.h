// Launches of attention as the host plans them: jobs, their axes, and which kernel they need.
#pragma once

#include "attention_jobs.h"
#include "attention_power.h"
#include "launch.h"

namespace fastkd::cuda::maps {

// Whether a kernel is for float32 arithmetic and the exponents that nearly all calls have.
template <class Fold>
constexpr bool kIsCommon = std::is_same_v<typename Fold::Raise, Simple<float>>;

// Blocks on a multiprocessor: `common`, or 4 where a thread needs up to 128 registers, for a call
// keeps more, and so do the argmax.
template <class Fold>
constexpr int blocks_together(int common) {
  return kIsCommon<Fold> && !Fold::kHasArgmax ? common : 4;
}

template <class Job>
struct Plan {
  std::vector<Job> jobs;
  std::vector<Axis> axes;

  // Before a job is added: it begins where the last one ends.
  uint32_t units() const { return jobs.empty() ? 0 : jobs.back().last_unit; }
  void add(Job job, uint64_t count) {
    if (units() + count > INT32_MAX)
      throw std::invalid_argument("attention: too many elements for a GPU");
    job.first_unit = units();
    job.last_unit = units() + uint32_t(count);
    jobs.push_back(job);
  }
};

inline void rebase(Pass& pass, int first_axis) { pass.first_axis -= first_axis; }
inline void rebase(Pair& pair, int first_axis) {
  for (Pass& map : pair.maps) rebase(map, first_axis);
}
inline void rebase(Side& side, int first_axis) { rebase(side.gradient, first_axis); }
inline int axes_from(const Pair& pair) { return pair.maps[0].first_axis; }
inline int axes_from(const Side& side) { return side.gradient.first_axis; }

// f(a table, the number of its first job): as many as the plan's jobs fill.
template <class Table, class Job, class F>
void over_tables(const Plan<Job>& plan, const F& f) {
  const auto axes_until = [&](size_t i) {
    return i + 1 < plan.jobs.size() ? axes_from(plan.jobs[i + 1]) : int(plan.axes.size());
  };
  for (size_t next = 0; next < plan.jobs.size();) {
    const size_t begin = next;
    const int first_axis = axes_from(plan.jobs[begin]);
    const uint32_t first_unit = plan.jobs[begin].first_unit;
    Table table;
    table.count = 0;
    for (; next < plan.jobs.size() && table.count < Table::kJobs; ++next) {
      if (axes_until(next) - first_axis > Table::kAxes) break;
      Job job = plan.jobs[next];
      rebase(job, first_axis);
      job.first_unit -= first_unit;
      job.last_unit -= first_unit;
      table.jobs[table.count++] = job;
    }
    std::copy(plan.axes.begin() + first_axis, plan.axes.begin() + axes_until(next - 1), table.axes);
    f(table, begin);
  }
}

// Most calls fit the small table; a parameter of 30 KB takes longer to hand over. Float64 and
// unusual exponents do without it, so that there are fewer kernels.
template <class Job>
using Few = Table<Job, 5, 6>;
template <class Job>
using Many = Table<Job, 48, 200>;
static_assert(sizeof(Many<Pair>) < 32000 && Many<Pair>::kAxes >= 2 * kMaxDims);

template <class Fold, class Job, class F>
void with_tables(const Plan<Job>& plan, const F& f) {
  if constexpr (kIsCommon<Fold>)
    if (plan.jobs.size() <= Few<Job>::kJobs && plan.axes.size() <= Few<Job>::kAxes)
      return over_tables<Few<Job>>(plan, f);
  over_tables<Many<Job>>(plan, f);
}

// f(a null pointer of what is kept of the channels)
template <class A, class F>
void with_fold(const MapParameters& p, const F& f) {
  const auto with_raise = [&](auto* raise) {
    using Raise = std::remove_pointer_t<decltype(raise)>;
    if (p.kind == MapKind::max_pow)
      f(static_cast<LargestOf<A, Raise>*>(nullptr));
    else
      f(static_cast<SumOf<A, Raise>*>(nullptr));
  };
  if constexpr (std::is_same_v<A, float>)
    if (p.p == 1 || p.p == 2) return with_raise(static_cast<Simple<A>*>(nullptr));
  with_raise(static_cast<General<A>*>(nullptr));
}

template <class F>
void with_arithmetic(DType dtype, const F& f) {
  if (dtype == DType::f64)
    f(static_cast<double*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

}  // namespace fastkd::cuda::maps
