// Soft targets of rows of few classes, as many together as a vector has lanes: what each row needs
// once is done for all of them at once.
#pragma once

#include "soft_target_block.h"
#include "soft_target_lanes.h"

namespace fastkd::FASTKD_ISA {

// The `count` rows from `first` on, whose classes are contiguous in every tensor. Flattened: calls
// show beside so few classes.
template <class D, class S, class A>
[[gnu::flatten]] void forward_rows(const Arguments<A>& a, int64_t first, int count) {
  constexpr int W = Simd<A>::width;
  const auto& sides = a.rows.sides;
  const int n = int(a.classes), kept = a.rates.has_hard ? 3 : 2;
  const int64_t capacity = (n + W - 1) / W * W;
  A* memory = scratch<A>(kept * capacity * count);
  const auto exponentials = [&](int i) {
    A* base = memory + kept * capacity * i;
    return Exponentials<A>{base, base + capacity, base + 2 * capacity};
  };

  Block<S> blocks[W];
  vec_t<A> student[W] = {}, teacher[W] = {}, hard[W] = {}, difference[W] = {}, shifted[W] = {};
  Lanes<A> lanes{};
  for (int i = 0; i < count; ++i) {
    if (a.ignores(first + i)) continue;
    blocks[i] = {at<S>(*sides[kStudent].tensor, a.rows.offset(sides[kStudent], first + i)),
                 at<S>(*sides[kTeacher].tensor, a.rows.offset(sides[kTeacher], first + i)), n};
    Maxima<A, S> maxima{blocks[i]};
    maxima.take_from(0);
    student[i] = maxima.student;
    teacher[i] = maxima.teacher;
    if (a.labels) lanes.label[i] = A(widen(blocks[i].student[a.labels[first + i]]));
  }
  lanes.student_max = maxima<A>(student);
  lanes.teacher_max = maxima<A>(teacher);

  alignas(64) A s_shift[W], t_shift[W];
  for (int i = 0; i < W; ++i) {
    s_shift[i] = shift(lanes.student_max[i]);
    t_shift[i] = shift(lanes.teacher_max[i]);
  }
  for (int i = 0; i < count; ++i) {
    const auto found = exponentiate<D>(blocks[i], origin(lanes.student_max[i]),
                                       origin(lanes.teacher_max[i]), a, exponentials(i));
    student[i] = found.student;
    teacher[i] = found.teacher;
    hard[i] = found.hard;
    difference[i] = found.difference;
    shifted[i] = found.shifted;
  }
  lanes.student = sums<A>(student);
  lanes.teacher = sums<A>(teacher);
  lanes.difference = sums<A>(difference);
  if (a.rates.has_hard) lanes.hard = sums<A>(hard);
  if (a.p.label_smoothing > 0) lanes.shifted = sums<A>(shifted);
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(lanes.difference[i]))
      lanes.difference[i] =
          A(difference_with_exclusions<D>(blocks[i], s_shift[i], t_shift[i], a, exponentials(i)));
    if (!std::isfinite(lanes.shifted[i])) lanes.shifted[i] = A(shifted_sum(blocks[i], s_shift[i]));
  }

  if constexpr (D::kNormalizes)
    with_terms(a.p.divergence, [&](auto terms) {
      for (int i = 0; i < count; ++i) {
        if (a.ignores(first + i)) continue;
        const RowTerms found = add_terms<decltype(terms)>(exponentials(i), n, 1 / lanes.student[i],
                                                          1 / lanes.teacher[i], shares_of(a));
        lanes.phi[i] = A(found.phi);
        lanes.psi[i] = A(found.psi);
      }
    });

  const auto k = finish<D>(lanes, a, first, count);
  if (!a.to_student) return;
  const Tensor& gradient = *sides[kToStudent].tensor;
  const auto write = [&](auto has_hard) {
    for (int i = 0; i < count; ++i) {
      S* to = at<S>(gradient, a.rows.offset(sides[kToStudent], first + i));
      if (a.ignores(first + i)) {
        std::memset(to, 0, size_t(n) * sizeof(S));
        continue;
      }
      const Factors<A> of_row{k.student[i], k.teacher[i], k.hard[i], k.smoothing,
                              k.label,      k.soft,       has_hard};
      combine<D>(exponentials(i), of_row, n, to, gradient.non_temporal);
      if (a.labels) {
        const int64_t label = a.labels[first + i];
        narrow(label_gradient<D>(exponentials(i), of_row, label), to + label);
      }
    }
  };
  // A constant, which leaves no branch in a loop over so few classes.
  k.has_hard ? write(std::true_type{}) : write(std::false_type{});
}

}  // namespace fastkd::FASTKD_ISA
