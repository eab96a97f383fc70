// Soft targets of as many rows at once as a vector has lanes, when their classes have been added
// up. Rows of few classes have little else to do: their logarithms and divisions would take most of
// the time one by one.
#pragma once

#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

template <class A>
struct Lanes {
  vec_t<A> student_max, teacher_max;
  vec_t<A> student_sum, teacher_sum, hard_sum;
  vec_t<A> difference;      // Σ et · ((t − t_max) − (s − s_max)), scaled
  vec_t<A> shifted;         // Σ (s − s_max), scaled, for label smoothing
  A label[Simd<A>::width];  // the student's logit of the label
};

// The statistics of `count` rows, and what their gradients are made of.
template <class A>
Combination<A, vec_t<A>> finish(const Lanes<A>& rows, const Plan<A>& plan, const int64_t* labels,
                                int count, A* table) {
  constexpr int W = Simd<A>::width;
  alignas(64) A student[W], teacher[W], hard[W], kl[W], to_student[W], to_teacher[W], to_hard[W];
  double log_hard[W] = {};
  store(rows.student_sum, student);
  store(rows.teacher_sum, teacher);
  store(rows.hard_sum, hard);
  store(rows.difference, kl);
  for (int i = 0; i < W; ++i) {
    const double zs = student[i], zt = teacher[i];
    kl[i] = A(double(kl[i]) / zt * plan.inverse_temperature + log_of(zs / zt) * kLogitScale);
    to_student[i] = A(plan.soft_gradient / zs);
    to_teacher[i] = A(plan.soft_gradient / zt);
    to_hard[i] = 0;
  }
  for (int i = 0; plan.hard && i < W; ++i) {
    log_hard[i] = log_of(hard[i]) * kLogitScale;
    to_hard[i] = A(plan.hard_gradient / double(hard[i]));
  }
  for (int i = 0; i < count; ++i) {
    A* row = table + i * kCount;
    if (plan.ignores(labels, i)) {
      for (int j = 0; j < kCount; ++j) row[j] = 0;
      continue;
    }
    row[kStudentMax] = rows.student_max[i];
    row[kStudentSum] = student[i];
    row[kTeacherMax] = rows.teacher_max[i];
    row[kTeacherSum] = teacher[i];
    row[kHardSum] = plan.hard ? hard[i] : 0;
    row[kKl] = kl[i] < 0 ? 0 : kl[i];  // rounding may leave a tiny negative number
    row[kCe] = 0;
    if (plan.hard)
      row[kCe] =
          A(plan.cross_entropy(log_hard[i] - (double(rows.label[i]) * kLogitScale -
                                              double(rows.student_max[i]) * kLogitScale),
                               log_hard[i] - double(rows.shifted[i]) / double(plan.classes)));
  }
  Combination<A, vec_t<A>> k{plan.soft_gradient != 0, plan.third_exponential,
                             load(to_student),        load(to_teacher),
                             load(to_hard),           plan.to_every_class()};
  if (plan.hard && !plan.third_exponential) k.student += k.hard;
  return k;
}

}  // namespace fastkd::FASTKD_ISA
