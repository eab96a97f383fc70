// Metrics of rows of logits: what a call is, what is added up of a row, and what follows from it,
// on every device.
#pragma once

#include <tuple>

#include "fields.h"
#include "row.h"

namespace fastkd {

struct MetricsParameters {
  double temperature;
  double teacher_temperature;
  int dim;  // of the classes, counted from the front

  static constexpr auto fields() {
    using P = MetricsParameters;
    return std::make_tuple(field("temperature", &P::temperature),
                           field("teacher_temperature", &P::teacher_temperature),
                           field("dim", &P::dim));
  }
};

// The values of a row, in the order in which all rows' are written one after another.
enum Metric {
  kStudentLogSumExp,
  kTeacherLogSumExp,
  kStudentEntropy,
  kTeacherEntropy,
  kForwardKl,
  kReverseKl,
  kOverlap,
  kMetrics
};

// Both temperatures, and what they make of logits: exponentials are exp(rate · (logit − maximum)),
// logits scaled. `ratio` brings the teacher's logits to the student's temperature.
struct MetricsRates {
  double temperature, teacher_temperature, student, teacher, ratio;
};

// A row or a part of it: maxima, and sums relative to them.
template <class A>
struct MetricsState {
  A student_max = A(-INFINITY), teacher_max = A(-INFINITY);
  A student = 0, teacher = 0;  // of exponentials
  // Of these times the scaled logits of their own side, and times t · ratio − s: by the teacher's
  // exponentials for the forward divergence, by the student's for the reverse one.
  A student_logits = 0, teacher_logits = 0, forward = 0, reverse = 0;

  // Relative to other maxima, which are no smaller. `by_s` and `by_t` bring exponentials there.
  FASTKD_ANYWHERE void move(A to_student, A to_teacher, A by_s, A by_t, A ratio) {
    const A x = shift(student_max) - shift(to_student), y = shift(teacher_max) - shift(to_teacher);
    const A apart = y * ratio - x;
    student_logits = moved(student_logits, student, x, by_s);
    teacher_logits = moved(teacher_logits, teacher, y, by_t);
    forward = moved(forward, teacher, apart, by_t);
    reverse = moved(reverse, student, apart, by_s);
    student *= by_s;
    teacher *= by_t;
    student_max = to_student;
    teacher_max = to_teacher;
  }

  // Adds others, relative to the same maxima.
  FASTKD_ANYWHERE void take(const MetricsState& other) {
    student += other.student;
    teacher += other.teacher;
    student_logits += other.student_logits;
    teacher_logits += other.teacher_logits;
    forward += other.forward;
    reverse += other.reverse;
  }

 private:
  // A sum of exponentials, whose own sum is `mass`, times what grows by `more`. One that is
  // infinite stays so, whatever the mass of its class.
  FASTKD_ANYWHERE static A moved(A sum, A mass, A more, A by) {
    if (by == 0) return sum - sum == 0 ? A(0) : sum;
    return by * (sum + (mass == 0 ? A(0) : mass * more));
  }
};

FASTKD_ANYWHERE double at_least_zero(double x) { return x < 0 ? 0 : x; }

// The values of a row but for the overlap. Rounding may leave a tiny negative number.
FASTKD_ANYWHERE void metrics_of(const MetricsState<double>& row, const MetricsRates& rates,
                                double (&to)[kMetrics]) {
  const double log_s = std::log(row.student), log_t = std::log(row.teacher);
  const double log_ratio = log_s - log_t;
  to[kStudentLogSumExp] = row.student_max / rates.temperature + log_s;
  to[kTeacherLogSumExp] = row.teacher_max / rates.teacher_temperature + log_t;
  to[kStudentEntropy] = at_least_zero(log_s - row.student_logits / row.student * rates.student);
  to[kTeacherEntropy] = at_least_zero(log_t - row.teacher_logits / row.teacher * rates.teacher);
  to[kForwardKl] =
      at_least_zero(ForwardKl::of_row(row.forward / row.teacher * rates.student, log_ratio));
  to[kReverseKl] =
      at_least_zero(ReverseKl::of_row(row.reverse / row.student * rates.student, log_ratio));
}

// Of the sum of the smaller probabilities, which rounding may bring beyond 1, and which has not
// seen what makes a side's sum of exponentials NaN or 0.
FASTKD_ANYWHERE double overlap_of(double sum, double student, double teacher) {
  if (!(student > 0 && teacher > 0)) return NAN;
  return sum > 1 ? 1 : sum;
}

}  // namespace fastkd
