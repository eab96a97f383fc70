// What kernels find of a row of logits, and the losses that follow from it, on every device.
#pragma once

#include <cmath>

#include "anywhere.h"
#include "divergence.h"
#include "soft_target.h"

namespace fastkd {

// The maximum to subtract, scaled: where every class is excluded, 0 leaves exp(-inf) = 0.
template <class A>
FASTKD_ANYWHERE A shift(A maximum) {
  return maximum == A(-INFINITY) ? A(0) : maximum * A(kLogitScale);
}

// What other maxima add to what is between the sides. `rates.origin(maximum)` is what is subtracted
// from a logit as the rates' arithmetic has it, and `rates.at_student` brings a difference of the
// teacher's to the student's temperature.
template <class A, class Rates>
FASTKD_ANYWHERE A moved_apart(A student, A to_student, A teacher, A to_teacher,
                              const Rates& rates) {
  return rates.at_student(rates.origin(teacher) - rates.origin(to_teacher)) -
         (rates.origin(student) - rates.origin(to_student));
}

// The term of a class that a side may exclude. Where there are vectors the last two are masks.
template <class D, class V, class M>
FASTKD_ANYWHERE V term_of(V es, V kept, V apart, M student_excludes, M teacher_excludes) {
  const M weigher = D::kByTeacher ? teacher_excludes : student_excludes;
  const M other = D::kByTeacher ? student_excludes : teacher_excludes;
  const V infinite = V{} + (D::kByTeacher ? INFINITY : -INFINITY);
  const V term = other ? infinite : D::term(es, kept, apart);
  return weigher ? V{} : term;
}

// A row or a part of it: maxima, and sums relative to them.
template <class A>
struct alignas(16) RowState {
  A student_max = A(-INFINITY), teacher_max = A(-INFINITY);
  A student = 0, teacher = 0, hard = 0;  // of exponentials; the last one's at temperature 1
  A difference = 0;                      // of the divergence's terms, scaled
  double logits = 0;                     // of the student's logits, scaled, for label smoothing

  // Relative to other maxima, which are no smaller. `rates.soft(from, to)`, `rates.teacher(from,
  // to)` and `rates.hard(from, to)` are what brings an exponential at the student's temperature,
  // the teacher's, and at 1, from one maximum to another.
  template <class D, class Rates>
  FASTKD_ANYWHERE void move(A to_student, A to_teacher, const Rates& rates) {
    const A by = rates.soft(student_max, to_student);
    const A t_by = rates.teacher(teacher_max, to_teacher);
    const A apart = moved_apart(student_max, to_student, teacher_max, to_teacher, rates);
    const A weigher = D::kByTeacher ? teacher : student, weigher_by = D::kByTeacher ? t_by : by;
    // An infinite difference stays so, whatever the mass of its class.
    difference = weigher_by == 0
                     ? (difference - difference == 0 ? A(0) : difference)
                     : weigher_by * (difference + (weigher == 0 ? A(0) : weigher * apart));
    student *= by;
    teacher *= t_by;
    if (rates.has_hard) hard *= rates.hard(student_max, to_student);
    student_max = to_student;
    teacher_max = to_teacher;
  }

  // Adds others, relative to the same maxima.
  FASTKD_ANYWHERE void take(const RowState& other) {
    student += other.student;
    teacher += other.teacher;
    hard += other.hard;
    difference += other.difference;
    logits += other.logits;
  }
};

// The divergence and the cross-entropy of a row, scaled.
struct Losses {
  double divergence = 0, cross_entropy = 0;
};

// The row's mean of the logarithm but for log(zs / zt), scaled. `inverse` is 1 / T.
template <class D, class A>
FASTKD_ANYWHERE double mean_of(const RowState<A>& row, double inverse) {
  return double(row.difference) / double(D::kByTeacher ? row.teacher : row.student) * inverse;
}

// From that mean, and the logarithm of the ratio of the sums.
template <class D>
FASTKD_ANYWHERE double divergence_of(double mean, double log_ratio) {
  const double found = D::of_row(mean, log_ratio * kLogitScale);
  return found < 0 ? 0 : found;  // rounding may leave a tiny negative number
}
template <class D, class A>
FASTKD_ANYWHERE double divergence_of(const RowState<A>& row, double inverse) {
  return divergence_of<D>(mean_of<D>(row, inverse),
                          std::log(double(row.student) / double(row.teacher)));
}

// Of a divergence of probabilities: Σφ, and the Σψ that the gradient takes.
struct RowTerms {
  double phi = 0, psi = 0;

  // Scaled. Of a row without a class or with NaN on either side nothing else is to be seen.
  FASTKD_ANYWHERE double divergence(double student, double teacher) const {
    return student > 0 && teacher > 0 ? (phi < 0 ? 0 : phi) * kLogitScale : double(NAN);
  }
  FASTKD_ANYWHERE double mean(double student, double teacher) const {
    return student > 0 && teacher > 0 ? psi : double(NAN);
  }
};

// From the logarithm of the sum at temperature 1, the maximum, the label's logit and the mean of
// all, scaled. Logits are compared with one another first: beside a large one the logarithm has no
// digits. A part of weight 0 may be infinite.
FASTKD_ANYWHERE double cross_entropy(double log_sum, double top, double label, double mean,
                                     double smoothing) {
  double found = 0;
  if (smoothing < 1) found += (1 - smoothing) * (log_sum + (top - label));
  if (smoothing > 0) found += smoothing * (log_sum + (top - mean));
  return found;
}

// What the gradient of each class is made of. A factor is a number for one row, and a vector for as
// many rows as it has lanes.
template <class A, class F = A>
struct Factors {
  F student, teacher, hard;  // of exponentials; the second one's as the divergence has it
  A smoothing, label;        // what is taken off every class, and off the label's
  // Whether the teacher counts: at a weight of 0 nothing that it holds may show, NaN neither. And
  // whether temperature 1 has exponentials of its own.
  bool soft, has_hard;

  // `es`, what was kept of the class, and its exponential at temperature 1.
  template <class D, class V>
  FASTKD_ANYWHERE V gradient(V es, V kept, V eh) const {
    V g = es * student - smoothing;
    if (soft) g += D::with_teacher(es, kept, teacher);
    if (has_hard) g += eh * hard;
    return g;
  }
};

}  // namespace fastkd
