// Soft targets and hard labels: what the CPU's kernels and the GPU's have in common.
#pragma once

#include "reduction.h"

namespace fastkd {

struct SoftTargetParameters {
  double temperature;
  double soft_weight;
  double hard_weight;
  double label_smoothing;
  int64_t ignore_index;
  Reduction reduction;
  int dim;  // of the classes, counted from the front
  int threads;
};

// Where a maximum is subtracted from logits they are multiplied by 2^-24. Any two finite logits
// then have a finite difference, and 2^22 classes a finite sum of differences: excluded classes
// alone are infinite. A power of 2 rounds nothing, so results have the same bits.
constexpr double kLogitScale = 0x1p-24;

// Statistics of one row, as many of the accumulation type (see fastkd/ops/soft_target.py). After
// those of the last row come the parts of the loss, (hard, T² KL), and the number of rows that
// count. The divergence and the cross-entropy of a row are scaled as its logits are.
enum Statistic { kStudentMax, kStudentSum, kTeacherMax, kTeacherSum, kHardSum, kKl, kCe, kCount };
constexpr int kParts = 3;

// A weight of 0 switches its term off, also where the term is infinite or NaN.
constexpr double weighted(double weight, double term) { return weight == 0 ? 0 : weight * term; }

}  // namespace fastkd
