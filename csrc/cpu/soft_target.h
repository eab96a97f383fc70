// What the row and column forms of soft targets share.
#pragma once

#include "exponential.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fastkd::FASTKD_ISA {

constexpr int kBlock = 1024;      // both sides and their exponentials fit in the first-level cache
constexpr int64_t kAhead = 8192;  // bytes between the logits computed and those fetched

struct Tensors {
  const Tensor *student, *teacher, *gradient, *to_teacher;
};

// The arguments in the form that the inner loops want them.
template <class A>
struct Plan {
  int64_t classes;
  bool hard;               // labels are given
  bool third_exponential;  // the cross-entropy's, at temperature 1
  Exp<A> softened, sharp;  // exp(x / T), exp(x)
  double inverse_temperature, smoothing;
  double divisor;                       // of the reduction
  double soft_gradient, hard_gradient;  // of q − p, and of q₁ − target

  Plan(int64_t rows, int64_t classes, const int64_t* labels, const SoftTargetParameters& p)
      : classes(classes),
        hard(labels != nullptr),
        third_exponential(hard && p.temperature != 1),
        softened(1 / p.temperature),
        sharp(1),
        inverse_temperature(1 / p.temperature),
        smoothing(p.label_smoothing) {
    int64_t kept = rows;
    if (labels)
      for (int64_t row = 0; row < rows; ++row) kept -= labels[row] == p.ignore_index;
    divisor = p.reduction == Reduction::batchmean ? double(kept)
              : p.reduction == Reduction::mean    ? double(kept) * double(classes)
                                                  : 1;
    if (divisor == 0) divisor = 1;
    soft_gradient = p.soft_weight / p.temperature / divisor;
    hard_gradient = hard ? p.hard_weight / divisor : 0;
  }

  // From −log q of the label and its mean over classes; a part of weight 0 may be infinite.
  double cross_entropy(double label, double mean) const {
    return (smoothing < 1 ? (1 - smoothing) * label : 0) + (smoothing > 0 ? smoothing * mean : 0);
  }
};

// Rows to losses, in an order that no thread changes.
template <class A>
void reduce(A* table, int64_t rows, const Plan<A>& plan, const SoftTargetParameters& p, A* loss) {
  // A weight of 0 switches its term off, also where the term is infinite.
  const auto weigh = [](double weight, double value) { return weight == 0 ? 0 : weight * value; };
  double soft = 0, hard = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const double kl = table[row * kCount + kKl], ce = table[row * kCount + kCe];
    if (p.reduction == Reduction::none)
      loss[row] = A(weigh(p.soft_weight, kl) + weigh(p.hard_weight, ce));
    soft += kl;
    hard += ce;
  }
  soft /= plan.divisor;
  hard /= plan.divisor;
  if (p.reduction != Reduction::none)
    loss[0] = A(weigh(p.soft_weight, soft) + weigh(p.hard_weight, hard));
  A* parts = table + rows * kCount;
  parts[0] = A(hard);
  parts[1] = A(soft);
}

}  // namespace fastkd::FASTKD_ISA
