// How much memory the launches of an operator need, in bytes. Nothing here needs CUDA's headers.
#pragma once

#include <cstddef>
#include <string>

#include "../operators.h"

namespace fastkd::cuda {

// Why the kernels cannot run on a device, or nothing if they can. To be compiled in is not enough:
// the chip may be another, the driver too old.
std::string problem(int device);

// The most blocks of a launch whose partial sums are put together.
constexpr int64_t kMostBlocks = 2048;

// Two sums of each block, a counter, and the number of rows.
constexpr size_t soft_target_scratch_bytes() { return sizeof(double) * (2 * kMostBlocks + 2); }

// There are slopes of each pair's student, and of its teacher after all students' where they are
// wanted.
size_t attention_scratch_bytes(const Tensors& slopes, size_t pairs);

// One sum of each block, and a counter; or where each sample has a loss, one of each unit of work.
constexpr size_t hint_scratch_bytes() { return sizeof(double) * (kMostBlocks + 1); }
size_t hint_rows_scratch_bytes(const Tensors& students, const Tensors& teachers, const Tensor& loss,
                               const Tensors& gradients);

constexpr size_t rkd_scratch_bytes() { return sizeof(double) * (4 * kMostBlocks + 6); }
size_t similarity_scratch_bytes(int64_t rows);

}  // namespace fastkd::cuda
