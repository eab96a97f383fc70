// Rows whose maxima and sums are known: their classes are read again, a block at a time. They may
// be a shard of those that the sums are of.
#pragma once

#include "soft_target_probabilities.h"
#include "soft_target_terms.h"

namespace fastkd::FASTKD_ISA {

// Logits of a block of a row, or the logarithms of a teacher's probabilities.
template <class A>
void gather_block(const Arguments<A>& a, int which, int64_t row, int64_t first, int n, A* to) {
  const Side& side = a.rows.sides[size_t(which)];
  const int64_t stride = side.class_stride;
  gather(*side.tensor, a.rows.offset(side, row) + first * stride, stride, n, to);
  if (which == kTeacher && a.p.teacher_is == TeacherIs::probabilities) take_logarithms(to, n);
}

// Of a row whose maxima and sums are known, what its classes here add to the divergence and to the
// mean that the gradient takes.
template <class T, class A>
RowTerms terms_of_row(const Arguments<A>& a, int64_t row, const A* statistics) {
  constexpr int W = Simd<A>::width;
  const A s_shift = shift(statistics[kStudentMax]), t_shift = shift(statistics[kTeacherMax]);
  const A scale = A(kLogitScale), by_s = A(1 / double(statistics[kStudentSum])),
          by_t = A(1 / double(statistics[kTeacherSum]));
  alignas(64) A student[kMostBlock] = {}, teacher[kMostBlock] = {};
  RowTerms total;
  for (int64_t first = 0; first < a.classes; first += thresholds.block) {
    const int64_t left = a.classes - first;
    const int n = int(left < thresholds.block ? left : thresholds.block);
    gather_block(a, kStudent, row, first, n, student);
    gather_block(a, kTeacher, row, first, n, teacher);
    for (int i = 0; i < n; i += W) {
      store(a.exp_soft(load(student + i) * scale - s_shift), student + i);
      const vec_t<A> t = load(teacher + i) * scale - t_shift;
      store(a.own ? a.exp_teacher(t) : a.exp_soft(t), teacher + i);
    }
    const RowTerms found =
        add_terms<T>(Exponentials<A>{student, teacher, student}, n, by_s, by_t, shares_of(a));
    total.phi += found.phi;
    total.psi += found.psi;
  }
  return total;
}

}  // namespace fastkd::FASTKD_ISA
