// Soft targets of as many rows at once as a vector has lanes, when their classes have been added
// up. Rows of few classes have little else to do: their logarithms and divisions would take most of
// the time one by one.
#pragma once

#include "soft_target_terms.h"

namespace fastkd::FASTKD_ISA {

// The states of so many rows.
template <class A>
struct Lanes {
  vec_t<A> student_max, teacher_max;
  vec_t<A> student, teacher, hard;  // sums of exponentials; the last one at temperature 1
  vec_t<A> difference;              // of the divergence's terms, scaled
  vec_t<A> phi, psi;                // of those of probabilities
  vec_t<A> shifted;                 // Σ (s − s_max), scaled, for label smoothing
  A label[Simd<A>::width];          // the student's logit of the label
};

// The results of `count` rows from `first` on, and what their gradients are made of.
template <class D, class A>
Factors<A, vec_t<A>> finish(const Lanes<A>& rows, const Arguments<A>& a, int64_t first, int count) {
  constexpr int W = Simd<A>::width;
  const Weights by = a.weights_of(first);
  alignas(64) A student[W], teacher[W], hard[W], difference[W];
  alignas(64) A to_student[W], to_teacher[W], to_hard[W] = {};
  double divergence[W], log_hard[W] = {};
  store(rows.student, student);
  store(rows.teacher, teacher);
  store(a.rates.has_hard ? rows.hard : rows.student, hard);
  store(rows.difference, difference);
  for (int i = 0; i < W; ++i) {
    const double zs = student[i], zt = teacher[i];
    double mean;
    if constexpr (D::kNormalizes) {
      const RowTerms found{rows.phi[i], rows.psi[i]};
      mean = found.mean(zs, zt);
      divergence[i] = found.divergence(zs, zt);
    } else {
      mean = mean_of<D>(RowState<A>{0, 0, student[i], teacher[i], 0, difference[i], 0},
                        a.rates.inverse);
      divergence[i] = divergence_of<D>(mean, log_of(zs / zt));
    }
    const auto soft = D::factors(by.soft, zs, zt, mean, a.rates.inverse);
    to_student[i] = A(soft.student);
    to_teacher[i] = A(soft.teacher);
  }
  for (int i = 0; a.labels && i < W; ++i) {
    log_hard[i] = log_of(hard[i]) * kLogitScale;
    to_hard[i] = A(by.hard / double(hard[i]));
  }
  for (int i = 0; i < count; ++i) {
    if (a.ignores(first + i)) {
      a.write(first + i, {0, 0, 0, 0, 0, 0, 0}, {0, 0});
      continue;
    }
    // The label's logit and the mean are relative to the maximum here.
    const double label =
        double(rows.label[i]) * kLogitScale - double(rows.student_max[i]) * kLogitScale;
    const double mean = double(rows.shifted[i]) / double(a.classes);
    a.write(first + i,
            {rows.student_max[i], rows.teacher_max[i], student[i], teacher[i],
             a.hard_sum(student[i], hard[i]), difference[i], 0},
            {divergence[i],
             a.labels ? cross_entropy(log_hard[i], 0, label, mean, a.p.label_smoothing) : 0});
  }
  return a.factors(SoftFactors<vec_t<A>>{load(to_student), load(to_teacher)}, load(to_hard), by);
}

}  // namespace fastkd::FASTKD_ISA
