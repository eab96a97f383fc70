// What the CUDA kernels offer. Nothing here needs CUDA's headers.
#pragma once

#include <string>

#include "../reduction.h"

namespace fastkd::cuda {

// Where a call runs: a device, and a stream of it as the runtime's handle.
struct Place {
  int device;
  uintptr_t stream;
};

// Why the kernels cannot run on a device, or nothing if they can. To be compiled in is not enough:
// the chip may be another, the driver too old.
std::string problem(int device);

// Bytes that a forward pass needs to put the sums of its blocks together.
constexpr int64_t kMostBlocks = 2048;
constexpr size_t kScratchBytes = sizeof(double) * (kMostBlocks + 1);

// The same of hints with a loss for each sample.
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

// Multiplies each gradient in place by the scalar grad_output. Where that is 1, no gradient is
// touched. All are float32 or float64, and each is one stretch of memory, in whatever order.
void multiply(const Tensors& gradients, const Tensor& grad_output, const Place& place);

}  // namespace fastkd::cuda
