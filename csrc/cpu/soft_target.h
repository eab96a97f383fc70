// What the row and column forms of soft targets share.
#pragma once

#include "exponential.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fastkd::FASTKD_ISA {

struct Tensors {
  const Tensor *student, *teacher, *gradient, *to_teacher;
};

// The arguments in the form that the inner loops want them.
template <class A>
struct Plan {
  int64_t classes;
  bool hard;               // labels are given
  bool third_exponential;  // the cross-entropy's, at temperature 1
  int64_t ignore_index;
  Exp<A> softened, sharp;          // exp(x / T), exp(x), of scaled logits
  Exp<A> raw_softened, raw_sharp;  // and of logits as they are
  double inverse_temperature;      // as `softened` has it
  double smoothing;
  int64_t kept;                         // rows that are not ignored
  double divisor;                       // of the reduction
  double soft_gradient, hard_gradient;  // of q − p, and of q₁ − target

  Plan(int64_t rows, int64_t classes, const int64_t* labels, const SoftTargetParameters& p)
      : classes(classes),
        hard(labels != nullptr),
        third_exponential(hard && p.temperature != 1),
        ignore_index(p.ignore_index),
        softened(1 / p.temperature / kLogitScale),
        sharp(1 / kLogitScale),
        raw_softened(1 / p.temperature),
        raw_sharp(1),
        inverse_temperature(softened.rate * kLogitScale),
        smoothing(p.label_smoothing),
        kept(rows) {
    for (int64_t row = 0; hard && row < rows; ++row) kept -= labels[row] == ignore_index;
    divisor = p.reduction == Reduction::batchmean ? double(kept)
              : p.reduction == Reduction::mean    ? double(kept) * double(classes)
                                                  : 1;
    if (divisor == 0) divisor = 1;
    soft_gradient = p.soft_weight / p.temperature / divisor;
    hard_gradient = hard ? p.hard_weight / divisor : 0;
  }

  // The same for a grad_output of `factor`.
  Plan times(double factor) const {
    Plan plan = *this;
    plan.soft_gradient *= factor;
    plan.hard_gradient *= factor;
    return plan;
  }

  bool ignores(const int64_t* labels, int64_t row) const {
    return hard && labels[row] == ignore_index;
  }

  // What every class, and what the label's takes off the gradient.
  A to_every_class() const { return A(hard_gradient * smoothing / double(classes)); }
  A to_label() const { return A(hard_gradient * (1 - smoothing)); }

  // From −log q of the label and its mean over classes; a part of weight 0 may be infinite.
  double cross_entropy(double label, double mean) const {
    return (smoothing < 1 ? (1 - smoothing) * label : 0) + (smoothing > 0 ? smoothing * mean : 0);
  }
};

template <class A>
struct Exponentials {
  A *student, *teacher, *hard;
};

// What a gradient is made of: a·es − b·et + c·eh − d. A factor is a number for one row, and a
// vector for as many rows as it has lanes.
template <class A, class Factor>
struct Combination {
  bool soft, third;  // whether the second and third term count: at a weight of 0 nothing that the
                     // teacher holds may show, NaN neither
  Factor student, teacher, hard;
  A smoothing;

  template <class Load>
  auto operator()(const Load& load, const Exponentials<A>& from) const {
    auto g = load(from.student) * student;
    if (soft) g -= load(from.teacher) * teacher;
    if (third) g += load(from.hard) * hard;
    return g - smoothing;
  }
};

template <class A>
void zero_row(const Tensor& gradient, int64_t at, int64_t stride, int64_t classes) {
  alignas(64) A zeros[kMostBlock] = {};
  for (int64_t first = 0; first < classes; first += kMostBlock)
    scatter(zeros, classes - first < kMostBlock ? classes - first : kMostBlock, gradient,
            at + first * stride, stride);
}

// Where both terms are switched off nothing is left of a gradient, NaN neither.
template <class A, int N>
void zero_if_off(const Plan<A>& plan, const Rows<N>& rows, const Tensor* gradient, int side) {
  if (gradient == nullptr || plan.soft_gradient != 0 || plan.hard_gradient != 0) return;
  for (int64_t row = 0; row < rows.count; ++row) {
    int64_t offsets[N];
    rows.offsets(row, offsets);
    zero_row<A>(*gradient, offsets[side], rows.class_stride[side], rows.classes);
  }
}

// Rows to losses, in an order that no thread changes.
template <class A>
void reduce(A* table, int64_t rows, const Plan<A>& plan, const SoftTargetParameters& p, A* loss) {
  // Terms stay scaled until they are weighted: a weighted sum or mean may be representable where
  // the term of a row is not.
  const auto loss_of = [&](double soft, double hard) {
    return A((weighted(p.soft_weight, soft) + weighted(p.hard_weight, hard)) / kLogitScale);
  };
  double soft = 0, hard = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const double kl = table[row * kCount + kKl], ce = table[row * kCount + kCe];
    if (p.reduction == Reduction::none) loss[row] = loss_of(kl, ce);
    soft += kl;
    hard += ce;
  }
  soft /= plan.divisor;
  hard /= plan.divisor;
  if (p.reduction != Reduction::none) loss[0] = loss_of(soft, hard);
  A* parts = table + rows * kCount;
  parts[0] = A(hard / kLogitScale);
  parts[1] = A(weighted(p.temperature * p.temperature, soft) / kLogitScale);
  parts[2] = A(plan.kept);
}

}  // namespace fastkd::FASTKD_ISA
