// Soft targets from several teachers, a row at a time and in blocks, as in soft_target_row.h.
#pragma once

#include "soft_target_ensemble.h"
#include "soft_target_row.h"

namespace fastkd::FASTKD_ISA {

// f(p) of the `n` logits from the row's class `first` on, side by side: where they are, or gathered
// into `room`.
template <class A, class F>
auto with_block(const Side& side, int64_t row_offset, int64_t first, int n, A* room, const F& f) {
  const int64_t offset = row_offset + first * side.stride();
  if (side.stride() != 1) {
    gather(*side.tensor, offset, side.stride(), n, room);
    return f(static_cast<const A*>(room));
  }
  return with_storage(side.tensor->dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    return f(static_cast<const S*>(at<S>(*side.tensor, offset)));
  });
}

// What is subtracted from a block's logits, and the sum of exponentials that follow.
struct Part {
  double maximum, sum;
};

template <class A, class S>
A maximum_of(const S* from, int n) {
  vec_t<A> maximum = splat<A>(-INFINITY);
  over_vectors<A>(n, [&](int i, auto lanes) {
    fetch(from + i, All<A>::value, kAhead);
    maximum = max<A>(load_lanes<A>(from + i, lanes, A(-INFINITY)), maximum);
  });
  return max_of<A>(maximum);
}

// The exponentials of a teacher's block take the place of the teacher's before, whose `share` goes
// into the mean. `earlier` is how many came before: none, one, or more.
template <int earlier, class A, class S>
Part take_teacher(const S* from, int n, Exp<A> softened, A share, A* e, A* mean) {
  const A maximum = maximum_of<A>(from, n), by = shift(maximum);
  vec_t<A> total = {};
  over_vectors<A>(n, [&](int i, auto lanes) {
    if constexpr (earlier == 1) store(load(e + i) * share, mean + i);
    if constexpr (earlier == 2) store(load(mean + i) + load(e + i) * share, mean + i);
    const vec_t<A> logits = load_lanes<A>(from + i, lanes, A(-INFINITY));
    const vec_t<A> exponential = exponentials_of<A>(logits, splat<A>(by), softened);
    total += exponential;
    store(exponential, e + i);
  });
  return {maximum, sum<A>(total)};
}

// The student's block, when the last teacher's exponentials lie in `e`: they go into the mean, and
// the student's take their place. Shifted by the block's maximum.
template <class A, class S>
Sums take_student(const S* from, int n, const Plan<A>& plan, bool with_loss, A share, A* e, A* mean,
                  A* hard) {
  using vec = vec_t<A>;
  const A maximum = maximum_of<A>(from, n), by = shift(maximum);
  const Exp<A> softened = plan.softened, sharp = plan.sharp;
  const A scale = A(kLogitScale), temperature = A(1 / plan.inverse_temperature * kLogitScale);
  const bool third = plan.third_exponential, smooths = plan.smoothing > 0;
  vec sum_e = {}, mass = {}, sum_hard = {}, difference = {}, shifted = {};
  over_vectors<A>(n, [&](int i, auto lanes) {
    const vec logits = load_lanes<A>(from + i, lanes, A(-INFINITY)), s = logits * scale - by;
    const vec u = keep<A>(load(mean + i) + load(e + i) * share, lanes);
    const vec es = softened(s);
    mass += u;
    sum_e += es;
    if (with_loss) difference += keep<A>(difference_of<A>(u, logits, s, temperature), lanes);
    store(u, mean + i);
    store(es, e + i);
    if (third) {
      const vec eh = sharp(s);
      sum_hard += eh;
      store(eh, hard + i);
    }
    if (smooths) shifted += keep<A>(s, lanes);
  });
  Sums sums;
  sums.student_max = maximum;
  sums.student_sum = sum<A>(sum_e);
  sums.teacher_max = 0;
  sums.teacher_sum = sum<A>(mass);
  sums.hard_sum = third ? sum<A>(sum_hard) : sums.student_sum;
  sums.difference = sum<A>(difference);
  if (smooths) sums.logits = sum<A>(shifted) + n * double(by);
  return sums;
}

// The loss of a row and its gradient. `table` gets the statistics that `reduce` reads.
template <class A>
void ensemble_row(const Ensemble& of, const Plan<A>& plan, int64_t row, int64_t label,
                  bool with_loss, A* table) {
  const int64_t width = thresholds.block, classes = plan.classes;
  const int64_t blocks = (classes + width - 1) / width, room = blocks * width;
  A* e = scratch<A>(3 * room + blocks + width);
  A *mean = e + room, *hard = mean + room, *gathered = hard + room, *maxima = gathered + width;
  const auto size = [&](int64_t first) {
    return int(classes - first < width ? classes - first : width);
  };

  // What brings the exponentials of a teacher's block to its share in the mean.
  double maximum = 0, factor = 0;
  const auto share = [&](int64_t block) {
    return A(factor * moving(maxima[block], maximum, plan.inverse_temperature));
  };
  for (size_t m = 0; m < of.teachers.size(); ++m) {
    const Side& teacher = of.teachers[m];
    const int64_t offset = teacher.offset(row);
    double highest = -INFINITY, total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * width;
      const int n = size(first);
      const A earlier = m == 0 ? 0 : share(b);
      const Part part = with_block(teacher, offset, first, n, gathered, [&](const auto* from) {
        const auto take = m == 0   ? take_teacher<0, A, std::decay_t<decltype(*from)>>
                          : m == 1 ? take_teacher<1, A, std::decay_t<decltype(*from)>>
                                   : take_teacher<2, A, std::decay_t<decltype(*from)>>;
        return take(from, n, plan.softened, earlier, e + first, mean + first);
      });
      const double both = part.maximum > highest ? part.maximum : highest;
      total = total * moving(highest, both, plan.inverse_temperature) +
              part.sum * moving(part.maximum, both, plan.inverse_temperature);
      highest = both;
      maxima[b] = A(part.maximum);
    }
    maximum = highest;
    factor = of.weights[m] / total;
  }

  const int64_t offset = of.student.offset(row);
  Sums sums;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * width;
    const int n = size(first);
    const A last = share(b);
    const Sums found = with_block(of.student, offset, first, n, gathered, [&](const auto* from) {
      return take_student(from, n, plan, with_loss, last, e + first, mean + first, hard + first);
    });
    maxima[b] = A(found.student_max);
    sums = b == 0 ? found : merged(sums, found, plan);
  }
  A logit = 0;
  if (plan.hard) gather(*of.student.tensor, offset + label * of.student.stride(), 1, 1, &logit);
  write_statistics(sums, plan, logit, table);
  if (!of.writes) return;

  const Tensor& gradient = *of.gradient.tensor;
  const int64_t to = of.gradient.offset(row), stride = of.gradient.stride();
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * width;
    const int n = size(first);
    const auto k = combination_of(sums, maxima[b], 0, plan);
    const Exponentials<A> from{e + first, mean + first, hard + first};
    if (stride == 1) {
      with_storage(gradient.dtype, [&](auto* storage) {
        using S = std::remove_pointer_t<decltype(storage)>;
        combine(from, k, n, at<S>(gradient, to + first), gradient.streams);
      });
    } else {
      combine(from, k, n, gathered, false);
      scatter(gathered, n, gradient, to + first * stride, stride);
    }
    if (plan.hard && label >= first && label < first + n) {
      const A g = label_gradient(from, k, label - first, plan.to_label());
      scatter(&g, 1, gradient, to + label * stride, 1);
    }
  }
}

}  // namespace fastkd::FASTKD_ISA
