// Soft targets of rows of few classes, as many together as a vector has lanes: what each row needs
// once is done for all of them at once.
#pragma once

#include "soft_target_block.h"
#include "soft_target_lanes.h"

namespace fastkd::FASTKD_ISA {

// The `count` rows from `first` on, whose logits lie side by side.
template <class A, class S>
void forward_rows(const Tensors& t, const Rows<3>& rows, const Plan<A>& plan, const int64_t* labels,
                  int64_t first, int count, A* table) {
  constexpr int W = Simd<A>::width;
  const int n = int(plan.classes), kept = plan.third_exponential ? 3 : 2;
  const int64_t room = (n + W - 1) / W * W;
  A* memory = scratch<A>(kept * room * count);
  const auto exponentials = [&](int i) {
    A* base = memory + kept * room * i;
    return Exponentials<A>{base, base + room, base + 2 * room};
  };

  int64_t offset[W][3];
  Block<S> blocks[W];
  vec_t<A> student[W] = {}, teacher[W] = {}, hard[W] = {}, difference[W] = {}, shifted[W] = {};
  Lanes<A> lanes{};
  for (int i = 0; i < count; ++i) {
    rows.offsets(first + i, offset[i]);
    if (plan.ignores(labels, i)) continue;
    blocks[i] = {at<S>(*t.student, offset[i][0]), at<S>(*t.teacher, offset[i][1]), n};
    Maxima<A, S> maxima{blocks[i]};
    maxima.take_from(0);
    student[i] = maxima.student;
    teacher[i] = maxima.teacher;
    if (plan.hard) lanes.label[i] = A(widen(blocks[i].student[labels[i]]));
  }
  lanes.student_max = maxima<A>(student);
  lanes.teacher_max = maxima<A>(teacher);

  alignas(64) A s_shift[W], t_shift[W];
  for (int i = 0; i < W; ++i) {
    s_shift[i] = shift(lanes.student_max[i]);
    t_shift[i] = shift(lanes.teacher_max[i]);
  }
  for (int i = 0; i < count; ++i) {
    const auto found = exponentiate(blocks[i], origin(lanes.student_max[i]),
                                    origin(lanes.teacher_max[i]), plan, exponentials(i));
    student[i] = found.student;
    teacher[i] = found.teacher;
    hard[i] = found.hard;
    difference[i] = found.difference;
    shifted[i] = found.shifted;
  }
  lanes.student_sum = sums<A>(student);
  lanes.teacher_sum = sums<A>(teacher);
  lanes.difference = sums<A>(difference);
  if (plan.hard) lanes.hard_sum = sums<A>(hard);
  if (plan.smoothing > 0) lanes.shifted = sums<A>(shifted);
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(lanes.difference[i]))
      lanes.difference[i] =
          A(difference_with_exclusions(blocks[i], s_shift[i], t_shift[i], exponentials(i).teacher));
    if (!std::isfinite(lanes.shifted[i])) lanes.shifted[i] = A(shifted_sum(blocks[i], s_shift[i]));
  }

  const auto k = finish(lanes, plan, labels, count, table);
  for (int i = 0; t.gradient && i < count; ++i) {
    S* to = at<S>(*t.gradient, offset[i][2]);
    if (plan.ignores(labels, i)) {
      std::memset(to, 0, size_t(n) * sizeof(S));
      continue;
    }
    const Combination<A, A> of_row{k.soft,       k.third,   k.student[i],
                                   k.teacher[i], k.hard[i], k.smoothing};
    combine(exponentials(i), of_row, n, to, t.gradient->streams);
    if (plan.hard)
      narrow(label_gradient(exponentials(i), of_row, labels[i], plan.to_label()), to + labels[i]);
  }
}

}  // namespace fastkd::FASTKD_ISA
