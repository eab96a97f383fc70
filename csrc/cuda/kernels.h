// What the CUDA kernels offer. Nothing here needs CUDA's headers.
#pragma once

#include <string>
#include <vector>

#include "../attention.h"
#include "../soft_target.h"

namespace fastkd::cuda {

// Where a call runs: a device, and a stream of it as the runtime's handle.
struct Place {
  int device;
  uintptr_t stream;
};

// Why the kernels cannot run on a device, or nothing if they can. To be compiled in is not enough:
// the chip may be another, the driver too old.
std::string problem(int device);

// Bytes that a forward pass needs to put the sums of its blocks together: hints,
constexpr int64_t kMostBlocks = 2048;
constexpr size_t kScratchBytes = sizeof(double) * (kMostBlocks + 1);

// and soft targets, which have two sums each, and count their rows.
constexpr size_t kSoftTargetScratchBytes = sizeof(double) * (2 * kMostBlocks + 2);

// The loss, and what is wanted of the statistics and the student's gradient for a grad_output of 1.
// The arithmetic is that of the loss's dtype. A label that is no class makes its row NaN.
void soft_target_forward(const Tensor& student, const Tensor& teacher, const int64_t* labels,
                         const Tensor& loss, void* statistics, const Tensor& gradient,
                         void* scratch, const SoftTargetParameters& p, const Place& place);

// Either gradient may be absent. grad_output is a scalar, or one per row, in the loss's dtype.
// `in_place`: the student's gradient is that for a grad_output of 1, and stays where it is 1.
void soft_target_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                          const int64_t* labels, const void* statistics, const Tensor& to_student,
                          const Tensor& to_teacher, bool in_place, const SoftTargetParameters& p,
                          const Place& place);

// Those that are wanted of the loss, its parts and the student's gradient, for a target that is the
// weighted mean of the teachers'. grad_output is 1, or a scalar, or one per row. `in_place`: the
// gradient is that for a grad_output of 1, and stays where it is 1.
void soft_target_ensemble(const Tensor& student, const Tensors& teachers,
                          const std::vector<double>& weights, const int64_t* labels,
                          const Tensor& loss, void* parts, const Tensor& gradient,
                          const Tensor& grad_output, bool in_place, void* scratch,
                          const SoftTargetParameters& p, const Place& place);

// The unnormalised map, and the winning channels of max_pow. The arithmetic is that of the map's
// dtype.
void attention_map_forward(const Tensor& features, const Tensor& raw, int32_t* winners,
                           const MapParameters& p, const Place& place);

// Bytes that a forward pass of attention transfer needs. There are slopes of each pair's student,
// and of its teacher after all students' where they are wanted.
size_t attention_scratch_bytes(const Tensors& slopes, size_t pairs);

// The loss, slopes and winners. The arithmetic is that of the loss's dtype.
void attention_transfer_forward(const Tensors& students, const Tensors& teachers,
                                const Tensor& loss, const Tensors& slopes,
                                const std::vector<int32_t*>& winners, void* scratch,
                                const TransferParameters& transfer, const MapParameters& p,
                                const Place& place);

// The gradients from slopes. grad_output is a scalar, or one per pair and sample; its dtype is the
// arithmetic's.
void attention_backward(const Tensor& grad_output, const Tensors& features, const Tensors& slopes,
                        const std::vector<int32_t*>& winners, const Tensors& gradients,
                        const MapParameters& p, const Place& place);

// Bytes that hints with a loss for each sample need instead.
size_t hint_scratch_bytes(const Tensors& students, const Tensors& teachers,
                          const Tensors& gradients, DType arithmetic);

// The loss, and the students' gradients for a grad_output of 1 if there are any; one may lie in its
// student's place. The arithmetic is that of the loss's dtype.
void hint_forward(const Tensors& students, const Tensors& teachers, const Tensor& loss,
                  const Tensors& gradients, void* scratch, double scale, Reduction reduction,
                  const Place& place);

// `gradients` are of students, then teachers; any may be absent. grad_output is a scalar, or one
// per pair and sample; its dtype is the arithmetic's. `in_place`: the gradients are those for a
// grad_output of 1, and stay as they are where it is 1.
void hint_backward(const Tensor& grad_output, const Tensors& students, const Tensors& teachers,
                   const Tensors& gradients, bool in_place, double scale, Reduction reduction,
                   const Place& place);

// Squared distances (N, N) in float64 between the rows of x (N, D), in float32 or float64.
void squared_distances(const Tensor& x, const Tensor& to, const Place& place);

// Relations: the loss, and its slopes (N, N) by the student's squared distances where they are
// wanted, in float64; those of a pair in both orders are added up.
constexpr size_t kRkdScratchBytes = sizeof(double) * (4 * kMostBlocks + 6);
void rkd_distance(const Tensor& student, const Tensor& teacher, const Tensor& loss,
                  const Tensor& slopes, void* scratch, double delta, const Place& place);
void rkd_angle(const Tensor& student, const Tensor& teacher, const Tensor& loss,
               const Tensor& slopes, void* scratch, double delta, const Place& place);

// Similarities: the same by the student's Gram matrix. All are of the loss's dtype.
size_t similarity_scratch_bytes(int64_t rows);
void similarity_preserving(const Tensor& student, const Tensor& teacher, const Tensor& loss,
                           const Tensor& slopes, void* scratch, const Place& place);

// Multiplies each gradient in place by the scalar grad_output. Where that is 1, no gradient is
// touched. All are float32 or float64, and each is one stretch of memory, in whatever order.
void multiply(const Tensors& gradients, const Tensor& grad_output, const Place& place);

}  // namespace fastkd::cuda
