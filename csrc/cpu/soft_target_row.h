// Soft targets and hard labels, a row at a time: one pass over the logits leaves the exponentials
// in cache, a second over the cache writes the gradient.
//
// A row is taken in blocks. Each block's exponentials are relative to the block's own maxima, and
// are brought to the row's when those are known, so that no logit is read from memory twice.
#pragma once

#include "soft_target_block.h"

namespace fastkd::FASTKD_ISA {

// What a pass over a block or a row finds, in double: a row has few blocks.
struct Sums {
  double student_max = -INFINITY, teacher_max = -INFINITY;
  double student_sum = 0, teacher_sum = 0, hard_sum = 0;
  double difference = 0;  // Σ et · ((t − t_max) − (s − s_max)), scaled
  double logits = 0;      // Σ s, scaled, for label smoothing
};

// The exponentials of a block relative to its maxima, and its sums; and the maxima of the next one.
template <class A, class S>
Sums sums_of(const Maxima<A, S>& maxima, const Plan<A>& plan, const Exponentials<A>& to,
             Maxima<A, S>& of_next) {
  const Block<S>& block = maxima.of;
  const A s_max = max_of<A>(maxima.student), t_max = max_of<A>(maxima.teacher);
  const A s_shift = shift(s_max), t_shift = shift(t_max);
  const auto found = exponentiate(block, origin(s_max), origin(t_max), plan, to, of_next);
  Sums sums{s_max,
            t_max,
            sum<A>(found.student),
            sum<A>(found.teacher),
            sum<A>(found.hard),
            sum<A>(found.difference),
            0};
  if (!std::isfinite(sums.difference))
    sums.difference = difference_with_exclusions(block, s_shift, t_shift, to.teacher);
  if (plan.smoothing > 0) {
    double shifted = sum<A>(found.shifted);
    if (!std::isfinite(shifted)) shifted = shifted_sum(block, s_shift);
    sums.logits = shifted + block.size * double(s_shift);
  }
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
                      part->teacher_sum * ((shift(part->teacher_max) - shift(out.teacher_max)) -
                                           (shift(part->student_max) - shift(out.student_max))));
  }
  return out;
}

// Where the blocks of rows are. Logits that do not lie side by side, or whose dtypes differ, are
// brought into arithmetic precision first, into one of two places in turn; S is A then.
template <class A, class S, bool gathered>
class Source {
 public:
  Source(const Tensors& tensors, const Rows<3>& rows, int64_t block)
      : tensors_(tensors), rows_(rows), block_(block) {}

  int size(int64_t first) const {
    return int(rows_.classes - first < block_ ? rows_.classes - first : block_);
  }

  // Blocks are asked for in order, and each stays until the next but one is.
  Block<S> block(const int64_t (&offset)[3], int64_t first) {
    const int n = size(first);
    if constexpr (gathered) {
      S* to = own_ + (turn_ ^= 1) * 2 * kMostBlock;
      const auto& stride = rows_.class_stride;
      gather(*tensors_.student, offset[0] + first * stride[0], stride[0], n, to);
      gather(*tensors_.teacher, offset[1] + first * stride[1], stride[1], n, to + kMostBlock);
      return {to, to + kMostBlock, n};
    } else {
      return {at<S>(*tensors_.student, offset[0] + first),
              at<S>(*tensors_.teacher, offset[1] + first), n};
    }
  }

 private:
  const Tensors& tensors_;
  const Rows<3>& rows_;
  const int64_t block_;
  alignas(64) S own_[gathered ? 4 * kMostBlock : 1];
  int turn_ = 0;
};

template <class A>
void write_statistics(const Sums& row, const Plan<A>& plan, A label_logit, A* to) {
  to[kStudentMax] = A(row.student_max);
  to[kStudentSum] = A(row.student_sum);
  to[kTeacherMax] = A(row.teacher_max);
  to[kTeacherSum] = A(row.teacher_sum);
  to[kHardSum] = A(row.hard_sum);
  const double kl = row.difference / row.teacher_sum * plan.inverse_temperature +
                    std::log(row.student_sum / row.teacher_sum) * kLogitScale;
  to[kKl] = A(kl < 0 ? 0 : kl);  // rounding may leave a tiny negative number
  to[kCe] = 0;
  if (!plan.hard) return;
  // Logits are compared with one another first: beside a large one the logarithm has no digits.
  const double log_sum = std::log(row.hard_sum) * kLogitScale, top = row.student_max * kLogitScale;
  to[kCe] = A(plan.cross_entropy(log_sum + (top - double(label_logit) * kLogitScale),
                                 log_sum + (top - row.logits / double(plan.classes))));
}

// What the gradient of a block is made of, whose exponentials are relative to other maxima than the
// row's.
template <class A>
Combination<A, A> combination_of(const Sums& row, double student_max, double teacher_max,
                                 const Plan<A>& plan) {
  const double es = moving(student_max, row.student_max, plan.inverse_temperature);
  const double et = moving(teacher_max, row.teacher_max, plan.inverse_temperature);
  const double eh = plan.hard ? moving(student_max, row.student_max, 1) : 0;
  Combination<A, A> k{plan.soft_gradient != 0,
                      plan.third_exponential,
                      A(plan.soft_gradient * es / row.student_sum),
                      A(plan.soft_gradient * et / row.teacher_sum),
                      A(plan.hard ? plan.hard_gradient * eh / row.hard_sum : 0),
                      plan.to_every_class()};
  if (plan.hard && !plan.third_exponential) k.student += k.hard;
  return k;
}

// The rows from `row` to `end`. The maxima of a block are found while the one before it is
// computed, also from row to row: so the logits come from memory behind arithmetic.
template <class A, class S, bool gathered>
void forward_stretch(const Tensors& t, const Rows<3>& rows, const Plan<A>& plan,
                     const int64_t* labels, int64_t row, int64_t end, A* table) {
  const int64_t width = thresholds.block, blocks = (rows.classes + width - 1) / width;
  // Without a gradient nobody asks for the exponentials again: one block's room will do.
  const bool write = bool(t.gradient);
  const int64_t room = (write ? blocks * width : width);
  const int kept = plan.third_exponential ? 3 : 2;
  A* memory = scratch<A>(kept * room + 2 * blocks);
  A *student_max = memory + kept * room, *teacher_max = student_max + blocks;
  const auto exponentials = [&](int64_t b) {
    A* base = memory + (write ? b * width : 0);
    return Exponentials<A>{base, base + room, base + 2 * room};
  };
  int64_t offset[3] = {}, next_offset[3] = {};
  // The first row from `row` on that is not ignored, and where it lies.
  const auto find = [&](int64_t row, int64_t (&offset)[3]) {
    for (; row < end; ++row) {
      rows.offsets(row, offset);
      if (!plan.ignores(labels, row)) break;
      for (int i = 0; i < kCount; ++i) table[row * kCount + i] = 0;
      if (write) zero_row<A>(*t.gradient, offset[2], rows.class_stride[2], rows.classes);
    }
    return row;
  };

  row = find(row, offset);
  if (row == end) return;
  Source<A, S, gathered> source(t, rows, width);
  alignas(64) A computed[gathered ? kMostBlock : 1];
  Maxima<A, S> maxima{source.block(offset, 0)};
  maxima.take_from(0);
  while (row < end) {
    int64_t after = end;
    Sums sums;
    for (int64_t b = 0; b < blocks; ++b) {
      Maxima<A, S> of_next;
      if (b + 1 < blocks)
        of_next.of = source.block(offset, (b + 1) * width);
      else if ((after = find(row + 1, next_offset)) < end)
        of_next.of = source.block(next_offset, 0);
      const Sums found = sums_of(maxima, plan, exponentials(b), of_next);
      sums = b == 0 ? found : merged(sums, found, plan);
      student_max[b] = A(found.student_max);
      teacher_max[b] = A(found.teacher_max);
      maxima = of_next;
    }
    const int64_t label = plan.hard ? labels[row] : 0;
    A logit;
    gather(*t.student, offset[0] + label * rows.class_stride[0], 1, 1, &logit);
    write_statistics(sums, plan, logit, table + row * kCount);

    for (int64_t b = 0; write && b < blocks; ++b) {
      const int64_t first = b * width, to = offset[2] + first * rows.class_stride[2];
      const int n = source.size(first);
      const auto k = combination_of(sums, student_max[b], teacher_max[b], plan);
      if constexpr (gathered) {
        combine(exponentials(b), k, n, computed, false);
        scatter(computed, n, *t.gradient, to, rows.class_stride[2]);
      } else {
        combine(exponentials(b), k, n, at<S>(*t.gradient, to), t.gradient->streams);
      }
      if (plan.hard && label >= first && label < first + n) {
        const A g = label_gradient(exponentials(b), k, label - first, plan.to_label());
        scatter(&g, 1, *t.gradient, offset[2] + label * rows.class_stride[2], 1);
      }
    }
    row = after;
    std::memcpy(offset, next_offset, sizeof offset);
  }
}

}  // namespace fastkd::FASTKD_ISA
