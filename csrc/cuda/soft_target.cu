// Soft targets and hard labels: the form that a call takes.
#include "soft_target_general.h"
#include "soft_target_plan.h"

namespace fastkd::cuda {
namespace logits {
namespace {

// Up to so many labels each block counts by itself, in a microsecond or two; a launch for it takes
// longer.
constexpr int64_t kCountedByEach = 8192;
constexpr int kCountThreads = 256;

__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const int64_t* labels, uint32_t rows, int64_t ignore_index,
                 unsigned long long* counted) {
  unsigned found = 0;
  const uint32_t step = gridDim.x * kCountThreads;
  for (uint32_t row = blockIdx.x * kCountThreads + threadIdx.x; row < rows; row += step) {
    found += labels[row] != ignore_index;
    if (rows - row <= step) break;
  }
  const double of_warp = warp_sum(found);
  // Whole numbers: their sum is the same in any order.
  if (threadIdx.x % kWarp == 0) atomicAdd(counted, static_cast<unsigned long long>(of_warp));
}

// The order of a launch's scratch memory.
struct Memory {
  unsigned long long counter, counted;
  double partial[2 * kMostBlocks];
};
static_assert(sizeof(Memory) == soft_target_scratch_bytes());

// f(call, mean, general), of which the second is there, and holds the call, where there are several
// teachers or the third holds it, which no other form serves: a common call does without kilobytes.
// `is_capped` is whether a softcap has a part in a gradient that is wanted.
template <class F>
void with_call(const Tensors& teachers, const SoftTargetParameters& p, const Tensors& temperatures,
               bool is_capped, const F& f) {
  GeneralCall* const absent = nullptr;
  if (p.divergence != Divergence::forward_kl || p.teacher_temperature != p.temperature ||
      p.teacher_is != TeacherIs::logits || !temperatures.empty() || is_capped) {
    GeneralCall general{};
    general.teacher_is = p.teacher_is;
    general.beta = p.beta;
    general.teacher_temperature = p.teacher_temperature;
    general.softcap = p.softcap;
    general.teacher_softcap = p.teacher_softcap;
    if (!temperatures.empty()) {
      general.temperatures = temperatures[0].data;
      general.teacher_temperatures = temperatures[1].data;
      general.roots = temperatures[2].data;
    }
    return f(general.mean.call, &general.mean, &general);
  }
  if (teachers.size() > 1) {
    MeanCall mean{};
    return f(mean.call, &mean, absent);
  }
  Call call{};
  f(call, static_cast<MeanCall*>(nullptr), absent);
}

void run(const GeneralCall& general, const Plan& plan, const Scratch& scratch,
         const Stream& stream) {
  launch_general(general, plan.are_columns && !general.is_capped(), scratch, stream);
}
void run(const MeanCall& mean, const Plan& plan, const Scratch& scratch, const Stream& stream) {
  if (plan.are_columns || mean.call.is_double ||
      !(launch_teachers_short_rows(mean, scratch, stream) ||
        launch_teachers_long_rows(mean, scratch, stream)))
    launch_passes(mean, plan.are_columns, scratch, stream);
}
void run(const Call& call, const Plan& plan, const Scratch& scratch, const Stream& stream) {
  if (plan.are_columns)
    launch_columns(call, scratch, stream);
  else if (call.is_double ||
           !(launch_few(call, scratch, stream) || launch_short_rows(call, scratch, stream) ||
             launch_long_rows(call, scratch, stream)))
    launch_stream(call, scratch, stream);
}

}  // namespace

Scratch prepare(Call& call, void* scratch, const Stream& stream) {
  auto* const memory = static_cast<Memory*>(scratch);
  call.partial = memory->partial;
  if (call.labels != nullptr && call.rows > kCountedByEach) {
    clear(&memory->counted, 1, DType::f64, stream);
    call.counted = &memory->counted;
    Grid grid{1, kCountThreads};
    grid.blocks = std::min((int64_t(call.rows) + kCountThreads - 1) / kCountThreads,
                           resident_clusters(count_kernel, grid, stream));
    launch(count_kernel, grid, stream, call.labels, call.rows, call.ignore_index, &memory->counted);
  }
  return {reinterpret_cast<unsigned*>(&memory->counter)};
}

}  // namespace logits

void soft_target_forward(const Place& place, const Tensor& student, const Tensors& teachers,
                         const Tensor& labels, const Tensor& loss, const Tensor& parts,
                         const Tensor& statistics, const Tensor& gradient, const Tensor& scratch,
                         const SoftTargetParameters& p, const Tensors& temperatures,
                         const Tensor& grad_output) {
  using namespace logits;
  const Stream stream(place);
  if (student.numel() == 0) {
    for (const fastkd::Tensor* output : {&loss, &parts, &statistics})
      clear(output->data, output->numel(), loss.dtype, stream);
    return;
  }
  const bool is_capped = gradient && p.softcap != 0;
  const auto run_on = [&](Call& call, MeanCall* mean, GeneralCall* general) {
    const Plan plan(call, mean, student, teachers, labels, gradient, {}, p, !temperatures.empty());
    call.loss = loss.data;
    call.parts = parts.data;
    call.statistics = statistics.data;
    call.grad_output = grad_output.data;
    const Scratch own = prepare(call, scratch.data, stream);
    general ? run(*general, plan, own, stream)
    : mean  ? run(*mean, plan, own, stream)
            : run(call, plan, own, stream);
  };
  with_call(teachers, p, temperatures, is_capped, run_on);
}

void soft_target_backward(const Place& place, const Tensor& grad_output, const Tensor& student,
                          const Tensors& teachers, const Tensor& labels, const Tensor& statistics,
                          const Tensor& to_student, const Tensor& to_teacher, const Tensor& scratch,
                          const SoftTargetParameters& p, const Tensor& in_place,
                          const Tensors& temperatures, const Tensor& to_temperatures) {
  using namespace logits;
  if (student.numel() == 0) return;
  const Stream stream(place);
  const bool is_capped = (to_student && p.softcap != 0) || (to_teacher && p.teacher_softcap != 0);
  const auto run_on = [&](Call& call, MeanCall* mean, GeneralCall* general) {
    const Plan plan(call, mean, student, teachers, labels, to_student, to_teacher, p,
                    !temperatures.empty());
    call.statistics = statistics.data;
    call.grad_output = grad_output.data;
    call.in_place = in_place.data;
    if (general != nullptr) general->to_temperatures = to_temperatures.data;
    // Statistics have all that there would be to count.
    const Scratch own = statistics ? Scratch{} : prepare(call, scratch.data, stream);
    general ? run(*general, plan, own, stream)
    : mean  ? run(*mean, plan, own, stream)
            : launch_backward(call, plan.are_columns, stream);
  };
  with_call(teachers, p, temperatures, is_capped, run_on);
}

void soft_target_terms(const Place& place, const Tensor& student, const Tensors& teachers,
                       const Tensor& labels, const Tensor& statistics, const Tensor& terms,
                       const SoftTargetParameters& p, const Tensors& temperatures) {
  using namespace logits;
  const Stream stream(place);
  if (student.numel() == 0) return clear(terms.data, terms.numel(), DType::f64, stream);
  with_call(
      teachers, p, temperatures, false, [&](Call& call, MeanCall* mean, GeneralCall* general) {
        if (general == nullptr)
          throw std::invalid_argument("terms are of divergences of probabilities");
        const Plan plan(call, mean, student, teachers, labels, {}, {}, p, !temperatures.empty());
        call.statistics = statistics.data;
        general->terms = terms.as<double>();
        run(*general, plan, {}, stream);
      });
}

}  // namespace fastkd::cuda
