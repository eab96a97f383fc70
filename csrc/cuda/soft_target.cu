// Soft targets and hard labels: a call as rows and axes, and the form that it takes.
#include <cfloat>
#include <stdexcept>

#include "kernels.h"
#include "soft_target_forms.h"

namespace fastkd::cuda {
namespace logits {
namespace {

// Up to so many labels each block counts by itself, in a microsecond or two; a launch for it takes
// longer.
constexpr int64_t kCountedByEach = 8192;
constexpr int kCountThreads = 256;

__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const int64_t* labels, uint32_t rows, int64_t ignore_index,
                 unsigned long long* kept) {
  unsigned found = 0;
  const uint32_t step = gridDim.x * kCountThreads;
  for (uint32_t row = blockIdx.x * kCountThreads + threadIdx.x; row < rows; row += step) {
    found += labels[row] != ignore_index;
    if (rows - row <= step) break;
  }
  const double of_warp = warp_sum(found);
  // Whole numbers: their sum is the same in any order.
  if (threadIdx.x % kWarp == 0) atomicAdd(kept, static_cast<unsigned long long>(of_warp));
}

// A call, and whether its rows lie side by side rather than their classes.
struct Plan {
  Call call{};
  bool are_columns = false;

  Plan(const fastkd::Tensor* const (&tensors)[kSides], const int64_t* labels,
       const SoftTargetParameters& p) {
    const fastkd::Tensor& student = *tensors[kStudent];
    call.classes = student.sizes[p.dim];
    call.share = 1 / double(call.classes);
    call.labels = labels;
    call.ignore_index = p.ignore_index;
    call.reduction = p.reduction;
    call.temperature = p.temperature;
    call.soft_weight = p.soft_weight;
    call.hard_weight = p.hard_weight;
    call.smoothing = labels == nullptr ? 0 : p.label_smoothing;
    // Where the largest logit alone counts, or all count the same, 0 · inf would be NaN.
    call.binary = float(std::min(std::max(kBinary / p.temperature / kLogitScale, double(FLT_MIN)),
                                 double(FLT_MAX)));
    for (int side = 0; side < kSides; ++side) {
      const bool is_there = bool(*tensors[side]);
      // What is absent moves with the tensor that it would be the gradient of.
      const fastkd::Tensor& like = is_there ? *tensors[side] : *tensors[side % kToStudent];
      call.sides[side] = {tensors[side]->data, like.dtype,
                          call.classes == 1 ? 1 : like.strides[p.dim]};
    }
    find_axes(tensors, p.dim);
    find_layout();
    call.inverse =
        is_double(call) ? 1 / p.temperature : double(call.binary) * kLogitScale / kBinary;
  }

 private:
  void find_axes(const fastkd::Tensor* const (&tensors)[kSides], int dim) {
    const fastkd::Tensor& student = *tensors[kStudent];
    int64_t rows = 1;
    for (int d = 0; d < student.ndim; ++d) {
      if (d == dim || student.sizes[d] == 1) continue;
      rows *= student.sizes[d];
      Axis axis{uint32_t(student.sizes[d]), {}};
      bool merges = call.axes > 0;
      for (int side = 0; side < kSides; ++side) {
        const bool is_there = bool(*tensors[side]);
        axis.stride[side] = (is_there ? tensors[side] : tensors[side % kToStudent])->strides[d];
        merges =
            merges && call.axis[call.axes - 1].stride[side] == axis.stride[side] * student.sizes[d];
      }
      if (merges) {
        axis.size *= call.axis[call.axes - 1].size;
        call.axis[call.axes - 1] = axis;
      } else {
        call.axis[call.axes++] = axis;
      }
    }
    if (rows > UINT32_MAX) throw std::invalid_argument("too many rows of logits for a GPU");
    call.rows = uint32_t(rows);
  }

  void find_layout() {
    int along_classes = 0, along_rows = 0;
    call.is_dense = call.is_aligned = true;
    for (const Tensor& side : call.sides) {
      if (side.data == nullptr) continue;
      const int64_t which = &side - call.sides;
      along_classes += side.class_stride == 1;
      along_rows += call.axes > 0 && call.axis[call.axes - 1].stride[which] == 1;
      call.is_dense = call.is_dense && side.class_stride == 1;
      call.is_aligned = call.is_aligned && reinterpret_cast<uintptr_t>(side.data) % kAccess == 0;
      for (int a = 0; a < call.axes; ++a)
        call.is_aligned =
            call.is_aligned && call.axis[a].stride[which] * size_of(side.dtype) % kAccess == 0;
    }
    call.is_aligned = call.is_aligned && call.is_dense;
    are_columns = along_rows > along_classes && !is_double(call) && call.classes <= INT32_MAX;
  }
};

// The order of a launch's scratch memory.
struct Memory {
  unsigned long long counter, kept;
  double partial[2 * kMostBlocks];
};
static_assert(sizeof(Memory) == kSoftTargetScratchBytes);

}  // namespace

void clear(void* p, int64_t elements, DType dtype, const Stream& stream) {
  if (p != nullptr && elements > 0)
    check(cudaMemsetAsync(p, 0, size_t(elements * size_of(dtype)), stream.handle), "clearing");
}

Scratch prepare(Call& call, void* scratch, const Stream& stream) {
  auto* const memory = static_cast<Memory*>(scratch);
  call.partial = memory->partial;
  if (call.labels != nullptr && call.rows > kCountedByEach) {
    clear(&memory->kept, 1, DType::f64, stream);
    call.kept = &memory->kept;
    Grid grid{1, kCountThreads};
    grid.blocks = std::min((int64_t(call.rows) + kCountThreads - 1) / kCountThreads,
                           resident_clusters(count_kernel, grid, stream));
    launch(count_kernel, grid, stream, call.labels, call.rows, call.ignore_index, &memory->kept);
  }
  return {reinterpret_cast<unsigned*>(&memory->counter)};
}

}  // namespace logits

void soft_target_forward(const Tensor& student, const Tensor& teacher, const int64_t* labels,
                         const Tensor& loss, void* statistics, const Tensor& gradient,
                         void* scratch, const SoftTargetParameters& p, const Place& place) {
  using namespace logits;
  const Stream stream(place);
  const fastkd::Tensor none{};
  Plan plan({&student, &teacher, &gradient, &none}, labels, p);
  Call& call = plan.call;
  call.loss = loss.data;
  call.statistics = statistics;
  if (statistics != nullptr)
    call.parts = static_cast<char*>(statistics) + int64_t(call.rows) * kCount * size_of(loss.dtype);
  if (call.rows == 0) {
    clear(call.loss, loss.numel(), loss.dtype, stream);
    clear(call.parts, kParts, loss.dtype, stream);
    return;
  }
  const Scratch own = prepare(call, scratch, stream);
  if (plan.are_columns)
    launch_columns(call, own, stream);
  else if (is_double(call) || !launch_rows(call, own, stream))
    launch_stream(call, own, stream);
}

void soft_target_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                          const int64_t* labels, const void* statistics, const Tensor& to_student,
                          const Tensor& to_teacher, bool in_place, const SoftTargetParameters& p,
                          const Place& place) {
  using namespace logits;
  const Stream stream(place);
  Plan plan({&student, &teacher, &to_student, &to_teacher}, labels, p);
  Call& call = plan.call;
  if (call.rows == 0) return;
  call.statistics = const_cast<void*>(statistics);
  call.grad_output = grad_output.data;
  call.in_place = in_place && grad_output.ndim == 0;
  launch_backward(call, plan.are_columns, stream);
}

}  // namespace fastkd::cuda
