// Soft targets from several teachers.
//
// The target is the mean u of the teachers' probabilities. To the student that is one teacher whose
// exponentials are u and whose logits are T log u: sums, statistics and gradient are those of
// soft_target_row.h, or of soft_target_columns.h where rows lie side by side. u stays in cache;
// each tensor is read from memory once.
#pragma once

#include <limits>
#include <vector>

#include "logarithm.h"
#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

// The rows of one tensor; those of several need not merge alike.
struct Side {
  Side(const Tensor& tensor, int dim) : tensor(&tensor), rows({&tensor}, dim) {}

  int64_t offset(int64_t row) const {
    int64_t at[1];
    rows.offsets(row, at);
    return at[0];
  }
  int64_t stride() const { return rows.class_stride[0]; }

  const Tensor* tensor;
  Rows<1> rows;
};

struct Ensemble {
  Side student, gradient;
  bool writes;  // the gradient is wanted
  std::vector<Side> teachers;
  std::vector<double> weights;  // their sum is 1
};

// A teacher's exponentials. Those of a class that it excludes are -0, which sums preserve only
// where no teacher has anything else: so a class that all exclude is told from one that underflows.
template <class A>
vec_t<A> exponentials_of(vec_t<A> logits, vec_t<A> shift, const Exp<A>& softened) {
  return logits == -INFINITY ? (vec_t<A>)sign_bits<A>() : softened(logits * A(kLogitScale) - shift);
}

// u · (T log u − s), scaled: the difference that the student's classes sum, s shifted. A class that
// every teacher excludes contributes 0; one that the student alone excludes is infinite, also where
// u underflows.
template <class A>
vec_t<A> difference_of(vec_t<A> mean, vec_t<A> logits, vec_t<A> shifted, A scaled_temperature) {
  const vec_t<A> tiny = splat<A>(std::numeric_limits<A>::min());
  const vec_t<A> product = mean * (log(max<A>(mean, tiny)) * scaled_temperature - shifted);
  const vec_t<A> present = logits == -INFINITY ? splat<A>(INFINITY) : product;
  return (bits_t<A>)mean == sign_bits<A>() ? vec_t<A>{} : present;
}

}  // namespace fastkd::FASTKD_ISA
