// Soft targets and hard labels: a call as rows and axes, and the form that it takes.
#include <cfloat>
#include <stdexcept>

#include "soft_target_forms.h"
#include "soft_target_general.h"

namespace fastkd::cuda {
namespace logits {
namespace {

// Up to so many labels each block counts by itself, in a microsecond or two; a launch for it takes
// longer.
constexpr int64_t kCountedByEach = 8192;
constexpr int kCountThreads = 256;
// Beyond so many classes a thread by itself would take too long, with several teachers.
constexpr int64_t kMostColumnClasses = 4096;

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

// A call, and whether its rows rather than its classes are contiguous. `mean` is there, and holds
// the call, where there are several teachers; what is known of the tensors takes them all.
class Plan {
 public:
  Plan(Call& call, MeanCall* mean, const fastkd::Tensor& student, const Tensors& teachers,
       const fastkd::Tensor& labels, const fastkd::Tensor& to_student,
       const fastkd::Tensor& to_teacher, const SoftTargetParameters& p, bool has_temperatures)
      : call_(call), mean_(mean), teachers_(teachers) {
    call.classes = student.sizes[p.dim];
    call.share = 1 / double(call.classes);
    call.labels = labels.as<int64_t>();
    call.ignore_index = p.ignore_index;
    call.has_hard =
        call.labels != nullptr && p.labels_are_classes && (p.temperature != 1 || has_temperatures);
    call.reduction = p.reduction;
    call.divergence = p.divergence;
    call.temperature = p.temperature;
    call.soft_weight = p.soft_weight;
    call.hard_weight = p.hard_weight;
    call.smoothing = call.labels == nullptr ? 0 : p.label_smoothing;
    call.all_classes = p.all_classes;
    // Where the largest logit alone counts, or all count the same, 0 · inf would be NaN.
    call.rate = float(
        std::min(std::max(kLog2E / p.temperature / kLogitScale, double(FLT_MIN)), double(FLT_MAX)));
    call.is_double = student.dtype == DType::f64;
    const fastkd::Tensor* const teacher = mean == nullptr ? &teachers[0] : &student;
    const fastkd::Tensor* const sides[] = {&student, teacher, &to_student, &to_teacher};
    for (int side = 0; side < kSides; ++side) {
      like_[side] = *sides[side] ? sides[side] : sides[side % kToStudent];
      call.sides[side] = tensor(sides[side]->data, *like_[side], p.dim);
    }
    if (mean != nullptr && (teachers.size() > kMostTeachers || teachers.size() != p.weights.size()))
      throw std::invalid_argument("too many teachers, or not as many weights");
    if (mean != nullptr) mean->have_one_dtype = true;
    for (size_t m = 0; m < teachers.size(); ++m) {
      call.is_double = call.is_double || teachers[m].dtype == DType::f64;
      if (mean == nullptr) continue;
      mean->have_one_dtype = mean->have_one_dtype && teachers[m].dtype == student.dtype;
      mean->teachers[mean->count++] = {tensor(teachers[m].data, teachers[m], p.dim), p.weights[m]};
    }
    find_axes(student, p.dim);
    mean == nullptr ? find_layout() : find_layout_of_mean();
  }

  bool are_columns = false;

 private:
  Call& call_;
  MeanCall* const mean_;
  const Tensors& teachers_;
  const fastkd::Tensor* like_[kSides];  // a gradient that is absent moves with its tensor

  Tensor tensor(char* data, const fastkd::Tensor& like, int dim) const {
    return {data, like.dtype, call_.classes == 1 ? 1 : like.strides[dim]};
  }

  void find_axes(const fastkd::Tensor& student, int dim) {
    int64_t rows = 1;
    for (int d = 0; d < student.ndim; ++d) {
      if (d == dim || student.sizes[d] == 1) continue;
      rows *= student.sizes[d];
      Axis axis{uint32_t(student.sizes[d]), {}};
      const int last = call_.axes - 1;
      bool merges = last >= 0;
      for (int side = 0; side < kSides; ++side) {
        axis.stride[side] = like_[side]->strides[d];
        merges = merges && call_.axis[last].stride[side] == axis.stride[side] * student.sizes[d];
      }
      for (int m = 0; merges && mean_ != nullptr && m < mean_->count; ++m)
        merges = mean_->row_stride[last][m] == teachers_[m].strides[d] * student.sizes[d];
      const int a = merges ? last : call_.axes++;
      if (merges) axis.size *= call_.axis[a].size;
      call_.axis[a] = axis;
      for (int m = 0; mean_ != nullptr && m < mean_->count; ++m)
        mean_->row_stride[a][m] = teachers_[m].strides[d];
    }
    if (rows > UINT32_MAX) throw std::invalid_argument("too many rows of logits for a GPU");
    call_.rows = uint32_t(rows);
  }

  // Whether rows, or vectors of so many elements in them, begin at multiples of so many bytes.
  bool is_aligned(int side, int64_t bytes) const {
    const Tensor& tensor = call_.sides[side];
    bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0;
    for (int a = 0; a < call_.axes; ++a)
      aligned = aligned && call_.axis[a].stride[side] * size_of(tensor.dtype) % bytes == 0;
    return aligned;
  }

  void find_layout() {
    int along_classes = 0, along_rows = 0;
    call_.is_dense = call_.is_aligned = true;
    for (int side = 0; side < kSides; ++side) {
      const Tensor& tensor = call_.sides[side];
      if (tensor.data == nullptr) continue;
      along_classes += tensor.class_stride == 1;
      along_rows += call_.axes > 0 && call_.axis[call_.axes - 1].stride[side] == 1;
      call_.is_dense = call_.is_dense && tensor.class_stride == 1;
      call_.is_aligned = call_.is_aligned && is_aligned(side, kAccess);
    }
    call_.is_aligned = call_.is_aligned && call_.is_dense;
    are_columns = along_rows > along_classes && !call_.is_double && call_.classes <= INT32_MAX;
    call_.inverse =
        call_.is_double ? 1 / call_.temperature : double(call_.rate) * kLogitScale / kLog2E;
  }

  // The student's layout counts, with its gradient's; each teacher's is found out where it is read.
  void find_layout_of_mean() {
    const Tensor& student = call_.sides[kStudent];
    const Tensor& gradient = call_.sides[kToStudent];
    call_.is_dense = student.class_stride == 1 && !call_.is_double;
    // Where dtypes differ, a vector takes two accesses on one side for one on the other.
    const int64_t bytes =
        mean_->have_one_dtype ? kAccess : kVector<Any, Any> * size_of(student.dtype);
    call_.is_aligned =
        call_.is_dense && is_aligned(kStudent, bytes) &&
        (gradient.data == nullptr || (gradient.class_stride == 1 && is_aligned(kToStudent, bytes)));
    if (call_.axes > 0 && call_.classes <= kMostColumnClasses) {
      const int last = call_.axes - 1;
      int along_classes = student.class_stride == 1;
      int along_rows = call_.axis[last].stride[kStudent] == 1;
      for (int m = 0; m < mean_->count; ++m) {
        along_classes += mean_->teachers[m].tensor.class_stride == 1;
        along_rows += mean_->row_stride[last][m] == 1;
      }
      are_columns = along_rows > along_classes;
    }
    const double rate =
        call_.is_double ? kLog2E / call_.temperature : double(call_.rate) * kLogitScale;
    const int exponent = std::max(std::ilogb(rate), 0);
    mean_->of_logarithm = std::ldexp(kLogitScale, -exponent);
    mean_->of_logit = std::ldexp(rate, -exponent);
    call_.inverse = std::ldexp(1 / kLog2E, exponent);
  }
};

// The order of a launch's scratch memory.
struct Memory {
  unsigned long long counter, counted;
  double partial[2 * kMostBlocks];
};
static_assert(sizeof(Memory) == soft_target_scratch_bytes());

// Fills memory with zeros, if there is any.
void clear(void* p, int64_t elements, DType dtype, const Stream& stream) {
  if (p != nullptr && elements > 0)
    check(cudaMemsetAsync(p, 0, size_t(elements * size_of(dtype)), stream.handle), "clearing");
}

// Gives a call its place for the partial sums of blocks, and counts its labels where they are many.
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

// f(call, mean, general), of which the second is there, and holds the call, where there are several
// teachers or the third holds it, which no other form serves: a common call does without kilobytes.
template <class F>
void with_call(const Tensors& teachers, const SoftTargetParameters& p, const Tensors& temperatures,
               const F& f) {
  GeneralCall* const absent = nullptr;
  if (p.divergence != Divergence::forward_kl || p.teacher_temperature != p.temperature ||
      p.teacher_is != TeacherIs::logits || !temperatures.empty()) {
    GeneralCall general{};
    general.teacher_is = p.teacher_is;
    general.beta = p.beta;
    general.teacher_temperature = p.teacher_temperature;
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
  launch_general(general, plan.are_columns, scratch, stream);
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
  with_call(teachers, p, temperatures, [&](Call& call, MeanCall* mean, GeneralCall* general) {
    const Plan plan(call, mean, student, teachers, labels, gradient, {}, p, !temperatures.empty());
    call.loss = loss.data;
    call.parts = parts.data;
    call.statistics = statistics.data;
    call.grad_output = grad_output.data;
    const Scratch own = prepare(call, scratch.data, stream);
    general ? run(*general, plan, own, stream)
    : mean  ? run(*mean, plan, own, stream)
            : run(call, plan, own, stream);
  });
}

void soft_target_backward(const Place& place, const Tensor& grad_output, const Tensor& student,
                          const Tensors& teachers, const Tensor& labels, const Tensor& statistics,
                          const Tensor& to_student, const Tensor& to_teacher, const Tensor& scratch,
                          const SoftTargetParameters& p, const Tensor& in_place,
                          const Tensors& temperatures, const Tensor& to_temperatures) {
  using namespace logits;
  if (student.numel() == 0) return;
  const Stream stream(place);
  with_call(teachers, p, temperatures, [&](Call& call, MeanCall* mean, GeneralCall* general) {
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
  });
}

void soft_target_terms(const Place& place, const Tensor& student, const Tensors& teachers,
                       const Tensor& labels, const Tensor& statistics, const Tensor& terms,
                       const SoftTargetParameters& p, const Tensors& temperatures) {
  using namespace logits;
  const Stream stream(place);
  if (student.numel() == 0) return clear(terms.data, terms.numel(), DType::f64, stream);
  with_call(teachers, p, temperatures, [&](Call& call, MeanCall* mean, GeneralCall* general) {
    if (general == nullptr)
      throw std::invalid_argument("terms are of divergences of probabilities");
    const Plan plan(call, mean, student, teachers, labels, {}, {}, p, !temperatures.empty());
    call.statistics = statistics.data;
    general->terms = terms.as<double>();
    run(*general, plan, {}, stream);
  });
}

}  // namespace fastkd::cuda
