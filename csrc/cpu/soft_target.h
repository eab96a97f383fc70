// What the forms of soft targets share: the arguments of a call, the results of its rows, and the
// loss that these make.
#pragma once

#include <limits>

#include "../row.h"
#include "exponential.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fastkd::FASTKD_ISA {

// The sides of a call's rows: the student, the gradients of the student and of the teacher (or what
// they are gradients of, where they are not wanted), and one teacher or several.
enum { kStudent, kToStudent, kToTeacher, kTeacher };

// What brings an exponential from one maximum to another.
struct Rates {
  double inverse;          // 1 / T, as the exponentials have it
  double teacher_inverse;  // and 1 / T of the teacher's
  double ratio;            // of the teacher's to the student's
  bool has_hard;           // the cross-entropy has exponentials of its own, at temperature 1

  static double moving(double from, double to, double rate) {
    return from == to ? 1 : from == -INFINITY ? 0 : std::exp((from - to) * rate);
  }
  double soft(double from, double to) const { return moving(from, to, inverse); }
  double teacher(double from, double to) const { return moving(from, to, teacher_inverse); }
  double hard(double from, double to) const { return moving(from, to, 1); }
  static double origin(double maximum) { return shift(maximum); }
  double at_student(double apart) const { return apart * ratio; }
};

// The weights of q − p and of q₁ − target in a row's gradient.
struct Weights {
  double soft, hard;
};

// A scaled difference of the teacher's logits, brought to the student's temperature. What is finite
// stays so: a class of no probability has no term, and 0 · inf would be NaN.
template <class A, class V>
V at_student(V apart, A ratio) {
  const V lowest = V{} - std::numeric_limits<A>::max() / 4, by = apart * ratio;
  return apart == -INFINITY ? apart : by < lowest ? lowest : by;
}

// The arguments in the form that the inner loops want them.
template <class A>
struct Arguments {
  const SoftTargetParameters& p;
  const Rows& rows;
  int64_t classes, teachers;
  bool to_student, to_teacher;  // whether these gradients are wanted
  const int64_t* labels;        // one a row, or absent
  const A* grad_output;         // a scalar, or one per row; absent for 1
  // The temperatures of rows, or none: of the student, of the teacher, and the one whose square
  // multiplies the divergence.
  const A *temperatures = nullptr, *teacher_temperatures = nullptr, *roots = nullptr;
  bool stated;                          // the teacher's probabilities are used as they are
  bool own;                             // the sides differ in temperature, or rows may
  Exp<A> exp_soft, exp_hard;            // exp(x / T), exp(x), of scaled logits
  Exp<A> raw_exp_soft, raw_exp_hard;    // and of logits as they are
  Exp<A> exp_teacher, raw_exp_teacher;  // at the teacher's temperature
  Rates rates;
  double divisor;  // of the reduction
  Weights weights;
  A* to_temperatures = nullptr;  // their gradients, of one kind after another, if they are wanted
  A* statistics = nullptr;       // of the rows, where they are wanted
  A* losses = nullptr;           // (divergence, cross-entropy) of each row, where they are wanted,
  int64_t step = 2;              // so far apart

  Arguments(const SoftTargetParameters& p, const Rows& rows, const Labels& of,
            const Tensors& temperatures, const Tensor& to, const Tensor& to_teacher,
            const Tensor& grad_output)
      : p(p),
        rows(rows),
        classes(rows.classes),
        teachers(int64_t(rows.sides.size()) - kTeacher),
        to_student(to),
        to_teacher(to_teacher),
        labels(of.labels),
        grad_output(grad_output.as<A>()),
        stated(p.teacher_is != TeacherIs::logits),
        own(stated || !temperatures.empty() || p.teacher_temperature != p.temperature),
        exp_soft(1 / p.temperature / kLogitScale),
        exp_hard(1 / kLogitScale),
        raw_exp_soft(1 / p.temperature),
        raw_exp_hard(1),
        exp_teacher(1 / p.teacher_temperature / kLogitScale),
        raw_exp_teacher(1 / p.teacher_temperature),
        rates{exp_soft.rate * kLogitScale, exp_teacher.rate * kLogitScale,
              exp_teacher.rate / exp_soft.rate,
              labels != nullptr && p.labels_are_classes &&
                  (!temperatures.empty() || p.temperature != 1)} {
    divisor = p.reduction == Reduction::batchmean ? double(of.kept)
              : p.reduction == Reduction::mean    ? double(of.kept) * double(classes)
                                                  : 1;
    if (divisor == 0) divisor = 1;
    weights = {p.soft_weight / p.temperature / divisor, labels ? p.hard_weight / divisor : 0};
    if (temperatures.empty()) return;
    this->temperatures = temperatures[0].as<A>();
    teacher_temperatures = temperatures[1].as<A>();
    roots = temperatures[2].as<A>();
  }

  // With the temperatures of one row, if rows have their own.
  Arguments of_row(int64_t row) const {
    Arguments of = *this;
    if (temperatures == nullptr) return of;
    const double temperature = temperatures[row], teacher = teacher_temperatures[row];
    of.exp_soft = Exp<A>(1 / temperature / kLogitScale);
    of.raw_exp_soft = Exp<A>(1 / temperature);
    of.exp_teacher = Exp<A>(1 / teacher / kLogitScale);
    of.raw_exp_teacher = Exp<A>(1 / teacher);
    of.rates.inverse = of.exp_soft.rate * kLogitScale;
    of.rates.teacher_inverse = of.exp_teacher.rate * kLogitScale;
    of.rates.ratio = of.exp_teacher.rate / of.exp_soft.rate;
    of.weights.soft = p.soft_weight * (squared(row) / temperature) / divisor;
    return of;
  }

  // What multiplies the divergence of a row besides its weight: NaN where a temperature is not
  // above 0.
  double squared(int64_t row) const {
    if (temperatures == nullptr || ignores(row)) return 1;
    const bool is_valid = temperatures[row] > 0 && teacher_temperatures[row] > 0;
    return is_valid ? double(roots[row]) * double(roots[row]) : NAN;
  }

  bool ignores(int64_t row) const { return labels && labels[row] == p.ignore_index; }

  bool differs_by_row() const { return grad_output && p.reduction == Reduction::none; }
  Weights weights_of(int64_t row) const {
    if (grad_output == nullptr) return weights;
    const double by = grad_output[differs_by_row() ? row : 0];
    return {weights.soft * by, weights.hard * by};
  }

  // How many a row has; a shard has some of them.
  int64_t all_classes() const { return p.all_classes != 0 ? p.all_classes : classes; }

  // The sum of exponentials at temperature 1.
  double hard_sum(double student, double hard) const {
    return labels == nullptr ? 0 : rates.has_hard ? hard : student;
  }

  template <class F>
  Factors<A, F> factors(SoftFactors<F> soft, F hard, const Weights& by) const {
    return {rates.has_hard ? soft.student : soft.student + hard,
            soft.teacher,
            hard,
            A(by.hard * p.label_smoothing / double(all_classes())),
            A(by.hard * (1 - p.label_smoothing)),
            by.soft != 0,
            rates.has_hard};
  }

  // The results of a row. Where a label is ignored all are 0.
  void write(int64_t row, const RowState<double>& of, const Losses& found) const {
    if (losses == nullptr) return;
    losses[row * step] = A(found.divergence);
    losses[row * step + 1] = A(found.cross_entropy);
    if (statistics == nullptr) return;
    A* to = statistics + row * kCount;
    to[kStudentMax] = A(of.student_max);
    to[kStudentSum] = A(of.student);
    to[kTeacherMax] = A(of.teacher_max);
    to[kTeacherSum] = A(of.teacher);
    to[kHardSum] = A(of.hard);
  }

  // The gradients of a row's temperatures, from its weight, the sums of the products of logits with
  // their gradients, and the divergence, all scaled.
  void write_temperatures(int64_t row, double weight, double by_student, double by_teacher,
                          double divergence) const {
    A* const to = to_temperatures + row;
    const double temperature = temperatures[row], own = teacher_temperatures[row];
    const bool is_off = weight == 0;  // nothing may show then, whatever the temperatures are
    to[0] = A(is_off ? 0 : by_student / kLogitScale / -temperature);
    to[rows.count] = A(is_off ? 0 : by_teacher / kLogitScale / -own);
    to[2 * rows.count] =
        A(is_off ? 0 : 2 * weight * temperature / double(roots[row]) * (divergence / kLogitScale));
  }

  // Zeros in the gradients that are wanted.
  void write_zeros(int64_t row) const {
    alignas(64) A zeros[kMostBlock] = {};
    for (int which : {kToStudent, kToTeacher}) {
      if (!(which == kToStudent ? to_student : to_teacher)) continue;
      const Side& side = rows.sides[size_t(which)];
      const int64_t to = rows.offset(side, row), stride = side.class_stride;
      for (int64_t first = 0; first < classes; first += kMostBlock)
        scatter(zeros, classes - first < kMostBlock ? classes - first : kMostBlock, *side.tensor,
                to + first * stride, stride);
    }
  }

  void skip(int64_t row) const {
    write(row, {0, 0, 0, 0, 0, 0, 0}, {0, 0});
    write_zeros(row);
  }
};

// What a class has in cache between the two passes: its exponential, what the divergence keeps, and
// its exponential at temperature 1. The second pass may write the gradient in the first one's
// place.
template <class A>
struct Exponentials {
  A *student, *kept, *hard;

  template <class D, class F, class Load>
  auto gradient(const Factors<A, F>& k, const Load& load) const {
    const auto es = load(student);
    return k.template gradient<D>(es, load(kept), k.has_hard ? load(hard) : decltype(es){});
  }
};

// What f(begin, end) of chunks of the rows add up to, in order. The chunks depend on the number of
// rows alone.
template <class F>
Losses sum_over_rows(int64_t rows, int threads, const F& f) {
  constexpr int64_t most = 64, least = 4096;
  const int64_t even = (rows + most - 1) / most, chunk = even < least ? least : even;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  Losses partial[most], total{};
  parallel_for(chunks, threads, [&](int64_t i) {
    partial[i] = f(i * chunk, i + 1 < chunks ? (i + 1) * chunk : rows);
  });
  for (int64_t i = 0; i < chunks; ++i) {
    total.divergence += partial[i].divergence;
    total.cross_entropy += partial[i].cross_entropy;
  }
  return total;
}

// Losses of rows to the loss and its parts, which may be absent, in an order that no thread
// changes.
template <class A>
void reduce(const Arguments<A>& a, A* loss, A* parts, int threads) {
  const SoftTargetParameters& p = a.p;
  // Terms stay scaled until they are weighted: a weighted sum or mean may be representable where
  // the term of a row is not.
  const auto put = [&](double soft, double hard, int64_t at, int64_t count) {
    loss[at] = A((weighted(p.soft_weight, soft) + weighted(p.hard_weight, hard)) / kLogitScale);
    if (parts == nullptr) return;
    parts[at] = A(hard / kLogitScale);
    parts[at + count] = A(weighted(p.temperature * p.temperature, soft) / kLogitScale);
  };
  const bool by_row = p.reduction == Reduction::none;
  const Losses total = sum_over_rows(a.rows.count, threads, [&](int64_t row, int64_t end) {
    Losses sum{};
    for (; row < end; ++row) {
      const double soft = a.losses[row * a.step] * a.squared(row),
                   hard = a.losses[row * a.step + 1];
      if (by_row) put(soft, hard, row, a.rows.count);
      sum.divergence += soft;
      sum.cross_entropy += hard;
    }
    return sum;
  });
  if (!by_row) put(total.divergence / a.divisor, total.cross_entropy / a.divisor, 0, 1);
}

}  // namespace fastkd::FASTKD_ISA
