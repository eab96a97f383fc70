// Soft targets and hard labels, a row at a time: one pass over the logits leaves the exponentials
// in cache, a second over the cache writes the gradient.
//
// A row is taken in blocks. Each block's exponentials are relative to the block's own maxima, and
// are brought to the row's when those are known, so that no logit is read from memory twice.
#pragma once

#include "soft_target.h"

namespace fastkd::FASTKD_ISA {

// One block of both sides, side by side in memory.
template <class S>
struct Block {
  const S *student, *teacher;
  int size;
};

// What a pass over a block or a row finds, in double: a row has few blocks.
struct Sums {
  double student_max = -INFINITY, teacher_max = -INFINITY;
  double student_sum = 0, teacher_sum = 0, hard_sum = 0;
  double difference = 0;  // Σ et · ((t − t_max) − (s − s_max))
  double logits = 0;      // Σ s, for label smoothing
};

// The maximum to subtract: where every class is excluded, 0 leaves exp(-inf) = 0.
inline double shift(double maximum) { return maximum == -INFINITY ? 0 : maximum; }

template <class A>
struct Exponentials {
  A *student, *teacher, *hard;
};

template <class A, class S>
void find_maxima(const Block<S>& block, Sums& sums) {
  const A lowest = -INFINITY;
  auto s = splat<A>(lowest), t = s;
  over_vectors<A>(block.size, [&](int i, auto lanes) {
    s = max<A>(load_lanes<A>(block.student + i, lanes, lowest), s);
    t = max<A>(load_lanes<A>(block.teacher + i, lanes, lowest), t);
  });
  sums.student_max = max_of<A>(s);
  sums.teacher_max = max_of<A>(t);
}

// Σ p·(log p − log q) of a block, unnormalised, where a class may be excluded: by the teacher it
// contributes 0 (and 0 · inf would be NaN), by the student alone it is infinite.
template <class A, class S>
A difference_with_exclusions(const Block<S>& block, const A* et, A s_shift, A t_shift) {
  A total = 0;
  for (int i = 0; i < block.size; ++i) {
    const A s = widen(block.student[i]), t = widen(block.teacher[i]);
    if (t == A(-INFINITY)) continue;
    total += s == A(-INFINITY) ? A(INFINITY) : et[i] * ((t - t_shift) - (s - s_shift));
  }
  return total;
}

// The exponentials of a block relative to its maxima, and its sums.
template <class A, class S>
Sums exponentiate(const Block<S>& block, const Plan<A>& plan, Exponentials<A> to) {
  using vec = vec_t<A>;
  Sums sums;
  find_maxima<A>(block, sums);
  const A s_shift = A(shift(sums.student_max)), t_shift = A(shift(sums.teacher_max));
  const A lowest = -INFINITY;
  // Copies, which the stores below cannot change: they stay in registers.
  const Exp<A> softened = plan.softened, sharp = plan.sharp;
  const bool third = plan.third_exponential, smooths = plan.smoothing > 0;
  const S *student = block.student, *teacher = block.teacher;
  vec s_sum = {}, t_sum = {}, hard_sum = {}, difference = {}, logits = {};
  over_vectors<A>(block.size, [&](int i, auto lanes) {
    fetch(student + i, All<A>::value, kAhead);
    fetch(teacher + i, All<A>::value, kAhead);
    const vec s = load_lanes<A>(student + i, lanes, lowest) - s_shift;
    const vec t = load_lanes<A>(teacher + i, lanes, lowest) - t_shift;
    const vec es = softened(s), et = softened(t);
    s_sum += es;
    t_sum += et;
    difference += keep<A>(et * (t - s), lanes);
    store(es, to.student + i);
    store(et, to.teacher + i);
    if (third) {
      const vec eh = sharp(s);
      hard_sum += eh;
      store(eh, to.hard + i);
    }
    if (smooths) logits += keep<A>(s, lanes);
  });
  sums.student_sum = sum<A>(s_sum);
  sums.teacher_sum = sum<A>(t_sum);
  sums.hard_sum = plan.third_exponential ? double(sum<A>(hard_sum)) : sums.student_sum;
  sums.difference = sum<A>(difference);
  if (!std::isfinite(sums.difference))
    sums.difference = difference_with_exclusions(block, to.teacher, s_shift, t_shift);
  if (plan.smoothing > 0) sums.logits = sum<A>(logits) + block.size * double(s_shift);
  return sums;
}

// exp((from − to) · rate): what moves exponentials from one maximum to another.
inline double moving(double from, double to, double rate) {
  return from == to ? 1 : from == -INFINITY ? 0 : std::exp((from - to) * rate);
}

// The sums of a row and of its next block, relative to the maxima of both.
template <class A>
Sums merged(const Sums& row, const Sums& block, const Plan<A>& plan) {
  Sums out;
  out.student_max = block.student_max > row.student_max ? block.student_max : row.student_max;
  out.teacher_max = block.teacher_max > row.teacher_max ? block.teacher_max : row.teacher_max;
  for (const Sums* part : {&row, &block}) {
    const double s_factor = moving(part->student_max, out.student_max, plan.inverse_temperature);
    const double t_factor = moving(part->teacher_max, out.teacher_max, plan.inverse_temperature);
    out.student_sum += part->student_sum * s_factor;
    out.teacher_sum += part->teacher_sum * t_factor;
    if (plan.hard) out.hard_sum += part->hard_sum * moving(part->student_max, out.student_max, 1);
    out.logits += part->logits;
    // The differences are relative to each side's maxima, and move with them. An infinite one
    // stays so, whatever the mass of its class.
    if (part->difference == INFINITY)
      out.difference += INFINITY;
    else if (t_factor == 0 || part->teacher_sum == 0)
      out.difference += t_factor * part->teacher_sum;
    else
      out.difference +=
          t_factor * (part->difference +
                      part->teacher_sum * ((part->teacher_max - out.teacher_max) -
                                           (shift(part->student_max) - shift(out.student_max))));
  }
  return out;
}

// What the gradient of a block is made of: a·es − b·et + c·eh − d.
template <class A>
struct Combination {
  A student, teacher, hard, smoothing;

  template <class Load>
  auto operator()(const Load& load, const Exponentials<A>& from, bool third) const {
    auto g = load(from.student) * student;
    // At a weight of 0 nothing that the teacher holds may show, NaN neither.
    if (teacher != 0) g -= load(from.teacher) * teacher;
    if (third) g += load(from.hard) * hard;
    return g - smoothing;
  }
};

template <class A, class S>
void combine(const Exponentials<A>& from, const Combination<A>& k, bool third, int n, S* to,
             bool streams) {
  write_vectors<A>(to, n, streams, [&](int i, auto lanes) {
    return k([&](const A* e) { return load_lanes<A>(e + i, lanes, A(0)); }, from, third);
  });
}

// Logits that do not lie side by side, or whose dtypes differ, are brought into arithmetic
// precision first, and their gradient is computed there; S is A then.
template <class A, class S, bool gathered>
void forward_row(const Tensors& t, const Plan<A>& plan, const int64_t (&offset)[3],
                 const int64_t (&stride)[3], int64_t label, A* statistics) {
  const int64_t classes = plan.classes, blocks = (classes + kBlock - 1) / kBlock;
  // Without a gradient nobody asks for the exponentials again: one block's room will do.
  const bool write = bool(t.gradient);
  const int64_t room = write ? blocks * kBlock : kBlock;
  const int kept = plan.third_exponential ? 3 : 2;
  A* memory = scratch<A>(kept * room + 2 * blocks);
  A *student_max = memory + kept * room, *teacher_max = student_max + blocks;
  alignas(64) S own[gathered ? 2 * kBlock : 1];
  const auto size_of_block = [&](int64_t b) {
    return int(classes - b * kBlock < kBlock ? classes - b * kBlock : kBlock);
  };
  const auto block_at = [&](int64_t b) {
    const int64_t first = b * kBlock;
    const int n = size_of_block(b);
    if constexpr (gathered) {
      gather(*t.student, offset[0] + first * stride[0], stride[0], n, own);
      gather(*t.teacher, offset[1] + first * stride[1], stride[1], n, own + kBlock);
      return Block<S>{own, own + kBlock, n};
    } else {
      return Block<S>{at<S>(*t.student, offset[0] + first), at<S>(*t.teacher, offset[1] + first),
                      n};
    }
  };
  const auto exponentials = [&](int64_t b) {
    A* base = memory + (write ? b * kBlock : 0);
    return Exponentials<A>{base, base + room, base + 2 * room};
  };

  Sums row;
  for (int64_t b = 0; b < blocks; ++b) {
    const Sums block = exponentiate<A>(block_at(b), plan, exponentials(b));
    row = b == 0 ? block : merged(row, block, plan);
    student_max[b] = A(block.student_max);
    teacher_max[b] = A(block.teacher_max);
  }
  statistics[kStudentMax] = A(row.student_max);
  statistics[kStudentSum] = A(row.student_sum);
  statistics[kTeacherMax] = A(row.teacher_max);
  statistics[kTeacherSum] = A(row.teacher_sum);
  statistics[kHardSum] = A(row.hard_sum);
  const double kl = row.difference / row.teacher_sum * plan.inverse_temperature +
                    std::log(row.student_sum / row.teacher_sum);
  statistics[kKl] = A(kl < 0 ? 0 : kl);  // rounding may leave a tiny negative number
  statistics[kCe] = 0;
  if (plan.hard) {
    A logit;
    gather(*t.student, offset[0] + label * stride[0], 1, 1, &logit);
    const double log_sum = std::log(row.hard_sum) + row.student_max;
    statistics[kCe] =
        A(plan.cross_entropy(log_sum - double(logit), log_sum - row.logits / double(classes)));
  }
  if (!write) return;

  for (int64_t b = 0; b < blocks; ++b) {
    const double inverse_t = plan.inverse_temperature;
    const double es = moving(student_max[b], row.student_max, inverse_t);
    const double et = moving(teacher_max[b], row.teacher_max, inverse_t);
    const double eh = plan.hard ? moving(student_max[b], row.student_max, 1) : 0;
    Combination<A> k{A(plan.soft_gradient * es / row.student_sum),
                     A(plan.soft_gradient == 0 ? 0 : plan.soft_gradient * et / row.teacher_sum),
                     A(plan.hard ? plan.hard_gradient * eh / row.hard_sum : 0),
                     A(plan.hard_gradient * plan.smoothing / double(classes))};
    if (plan.hard && !plan.third_exponential) k.student += k.hard;
    const int64_t first = b * kBlock;
    const int n = size_of_block(b);
    const Exponentials<A> from = exponentials(b);
    const int64_t to = offset[2] + first * stride[2];
    if constexpr (gathered) {
      combine(from, k, plan.third_exponential, n, own, false);
      scatter(own, n, *t.gradient, to, stride[2]);
    } else {
      combine(from, k, plan.third_exponential, n, at<S>(*t.gradient, to), t.gradient->streams);
    }
    if (plan.hard && label >= first && label < first + n) {
      const auto one = [&](const A* e) { return e[label - first]; };
      const A g =
          k(one, from, plan.third_exponential) - A(plan.hard_gradient * (1 - plan.smoothing));
      scatter(&g, 1, *t.gradient, offset[2] + label * stride[2], 1);
    }
  }
}

}  // namespace fastkd::FASTKD_ISA
