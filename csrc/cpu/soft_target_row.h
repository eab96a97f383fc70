// Soft targets and hard labels, a row at a time: one pass over the logits leaves the exponentials
// in cache, a second over the cache writes the gradient.
//
// A row is taken in blocks. Each block's exponentials are relative to the block's own maxima, and
// are brought to the row's when those are known, so that no logit is read from memory twice.
#pragma once

#include "soft_target_block.h"
#include "soft_target_probabilities.h"
#include "soft_target_terms.h"
#include "softcap.h"

namespace fastkd::FASTKD_ISA {

// The exponentials of a block relative to its maxima, and its sums in double, since a row has few
// blocks; and the maxima of the next one.
template <class D, bool own, class A, class S>
RowState<double> sums_of(const Maxima<A, S>& maxima, const Arguments<A>& a,
                         const Exponentials<A>& to, Maxima<A, S>& of_next) {
  const Block<S>& block = maxima.of;
  const A s_max = max_of<A>(maxima.student), t_max = max_of<A>(maxima.teacher);
  const A s_shift = shift(s_max), t_shift = shift(t_max);
  const auto found = exponentiate<D, own>(block, origin(s_max), origin(t_max), a, to, of_next);
  RowState<double> sums{s_max,
                        t_max,
                        sum<A>(found.student),
                        sum<A>(found.teacher),
                        sum<A>(found.hard),
                        sum<A>(found.difference),
                        0};
  if (!std::isfinite(sums.difference))
    sums.difference = difference_with_exclusions<D, own>(block, s_shift, t_shift, a, to);
  if (a.p.label_smoothing > 0) {
    double shifted = sum<A>(found.shifted);
    if (!std::isfinite(shifted)) shifted = shifted_sum(block, s_shift);
    sums.logits = shifted + block.size * double(s_shift);
  }
  return sums;
}

// Adds a row's block to its sums, relative to the maxima of both.
template <class D>
void merge(RowState<double>& row, RowState<double> block, const Rates& rates) {
  const double student = block.student_max > row.student_max ? block.student_max : row.student_max;
  const double teacher = block.teacher_max > row.teacher_max ? block.teacher_max : row.teacher_max;
  row.move<D>(student, teacher, rates);
  block.move<D>(student, teacher, rates);
  row.take(block);
}

// What the first pass leaves of a row's blocks, in a thread's scratch memory.
template <class A>
struct RowMemory {
  int64_t width = thresholds.block, blocks;
  // Where a block's exponentials are not asked for again, the next one's take their place.
  int64_t step, capacity;
  A *exponentials, *student_max, *teacher_max;

  RowMemory(const Arguments<A>& a, bool keeps)
      : blocks((a.classes + width - 1) / width),
        step(keeps ? width : 0),
        capacity(keeps ? blocks * width : width) {
    const int kept = a.rates.has_hard ? 3 : 2;
    exponentials = scratch<A>(kept * capacity + 2 * blocks);
    student_max = exponentials + kept * capacity;
    teacher_max = student_max + blocks;
  }

  Exponentials<A> block(int64_t b) const {
    A* base = exponentials + b * step;
    return {base, base + capacity, base + 2 * capacity};
  }
};

// A row's divergence, scaled, the mean that its gradient takes, and what the gradient's weight is
// multiplied by.
struct Outcome {
  double divergence, mean, weight;
};

template <class D, class A>
Outcome outcome_of(const Arguments<A>& a, const RowState<double>& sums,
                   const RowMemory<A>& memory) {
  if constexpr (D::kNormalizes) {
    const Shares<A> shares = shares_of(a);
    RowTerms total;
    with_terms(a.p.divergence, [&](auto terms) {
      for (int64_t b = 0; b < memory.blocks; ++b) {
        const int64_t left = a.classes - b * memory.width;
        const double by_s = a.rates.soft(memory.student_max[b], sums.student_max) / sums.student;
        const double by_t =
            a.stated ? a.rates.teacher(memory.teacher_max[b], 0)
                     : a.rates.teacher(memory.teacher_max[b], sums.teacher_max) / sums.teacher;
        const RowTerms found = add_terms<decltype(terms)>(
            memory.block(b), int(left < memory.width ? left : memory.width), A(by_s), A(by_t),
            shares);
        total.phi += found.phi;
        total.psi += found.psi;
      }
    });
    if (a.stated) {
      const double mass = Mass(sums.teacher_max, sums.teacher).value;
      const bool is_valid = sums.student > 0 && mass >= 0;
      const double phi = (total.phi + taken_off(a.p.divergence, a.p.beta, mass)) * kLogitScale;
      return {is_valid ? phi : NAN, is_valid ? total.psi : NAN, 1};
    }
    return {total.divergence(sums.student, sums.teacher), total.mean(sums.student, sums.teacher),
            1};
  } else {
    const double mean = mean_of<D>(sums, a.rates.inverse);
    const double divergence = a.losses ? divergence_of<D>(sums, a.rates.inverse) : 0;
    if (a.stated) {
      const Mass mass(sums.teacher_max, sums.teacher);
      return {with_mass(D{}, divergence, mass), mean, weight_of(D{}, mass)};
    }
    return {divergence, mean, 1};
  }
}

// The results of a row and its gradient, from the sums and what its blocks left.
template <class D, class A>
void finish_row(const Arguments<A>& a, int64_t row, RowState<double>& sums,
                const RowMemory<A>& memory) {
  const int64_t label = a.labels ? a.labels[row] : 0;
  sums.hard = a.hard_sum(sums.student, sums.hard);
  const Outcome found = outcome_of<D>(a, sums, memory);
  if (a.losses) {
    const Side& student = a.rows.sides[kStudent];
    A logit = 0;
    if (a.labels)
      gather(*student.tensor, a.rows.offset(student, row) + label * student.class_stride, 1, 1,
             &logit);
    a.write(row, sums,
            {found.divergence,
             a.labels ? cross_entropy(std::log(sums.hard) * kLogitScale,
                                      sums.student_max * kLogitScale, double(logit) * kLogitScale,
                                      sums.logits / double(a.classes), a.p.label_smoothing)
                      : 0});
  }
  if (!a.to_student) return;

  const Side& side = a.rows.sides[kToStudent];
  const Tensor& to = *side.tensor;
  const int64_t offset = a.rows.offset(side, row), stride = side.class_stride;
  const Weights by = a.weights_of(row);
  const double zt = a.stated && sums.teacher == 0 ? 1 : sums.teacher;  // a row without mass
  const auto soft =
      D::factors(weighted(by.soft, found.weight), sums.student, zt, found.mean, a.rates.inverse);
  const double hard = a.labels ? by.hard / sums.hard : 0;
  alignas(64) A computed[kMostBlock];
  for (int64_t b = 0; b < memory.blocks; ++b) {
    const int64_t first = b * memory.width;
    const int n = int(a.classes - first < memory.width ? a.classes - first : memory.width);
    const double s_max = memory.student_max[b], t_max = memory.teacher_max[b];
    const double by_s = a.rates.soft(s_max, sums.student_max);
    const double by_hard = a.rates.has_hard ? a.rates.hard(s_max, sums.student_max) : by_s;
    const auto moved =
        D::moved(soft, by_s, a.rates.teacher(t_max, sums.teacher_max),
                 moved_apart(s_max, sums.student_max, t_max, sums.teacher_max, a.rates));
    const Factors<A> k =
        a.factors(SoftFactors<A>{A(moved.student), A(moved.teacher)}, A(hard * by_hard), by);
    const Exponentials<A> from = memory.block(b);
    const bool has_label = a.labels && label >= first && label < first + n;
    if (stride == 1 && a.p.softcap == 0) {
      with_storage(to.dtype, [&](auto* storage) {
        using S = std::remove_pointer_t<decltype(storage)>;
        combine<D>(from, k, n, at<S>(to, offset + first), to.non_temporal);
      });
      if (!has_label) continue;
      const A g = label_gradient<D>(from, k, label - first);
      scatter(&g, 1, to, offset + label, 1);
    } else {
      combine<D>(from, k, n, computed, false);
      if (has_label) computed[label - first] -= k.label;
      uncap(a, kStudent, row, first, n, computed);
      scatter(computed, n, to, offset + first * stride, stride);
    }
  }
}

// The blocks of both sides of rows. Logits that are not contiguous, or whose dtypes differ, are
// brought into arithmetic precision first, into one of two buffers in turn; S is A then.
template <class A, class S, bool gathered>
class Source {
 public:
  explicit Source(const Arguments<A>& a) : a_(a) {}

  // Blocks are asked for in order, and each is valid until the second next call.
  Block<S> block(int64_t row, int64_t first) {
    const int64_t size = thresholds.block;
    const int n = int(a_.classes - first < size ? a_.classes - first : size);
    const Side &student = a_.rows.sides[kStudent], &teacher = a_.rows.sides[kTeacher];
    const int64_t s = a_.rows.offset(student, row) + first * student.class_stride;
    const int64_t t = a_.rows.offset(teacher, row) + first * teacher.class_stride;
    if constexpr (gathered) {
      S* to = buffers_ + (which_ ^= 1) * 2 * kMostBlock;
      gather(*student.tensor, s, student.class_stride, n, to);
      gather(*teacher.tensor, t, teacher.class_stride, n, to + kMostBlock);
      if (a_.p.teacher_is == TeacherIs::probabilities) take_logarithms(to + kMostBlock, n);
      return {to, to + kMostBlock, n};
    } else {
      return {at<S>(*student.tensor, s), at<S>(*teacher.tensor, t), n};
    }
  }

 private:
  const Arguments<A>& a_;
  alignas(64) S buffers_[gathered ? 4 * kMostBlock : 1];
  int which_ = 0;
};

// The rows from `row` to `end`. The maxima of a block are found while the one before it is
// computed, also from row to row: so the logits come from memory behind arithmetic.
template <class D, class S, bool gathered, bool own = false, class A>
void forward_stretch(const Arguments<A>& a, int64_t row, int64_t end) {
  const RowMemory<A> memory(a, a.to_student || D::kNormalizes);
  // The first row from `row` on that is not ignored.
  const auto find = [&](int64_t row) {
    for (; row < end && a.ignores(row); ++row) a.skip(row);
    return row;
  };
  row = find(row);
  if (row == end) return;
  Source<A, S, gathered> source(a);
  Maxima<A, S> maxima{source.block(row, 0)};
  maxima.take_from(0);
  // The arguments with the row's temperatures.
  using OfRow = std::conditional_t<own, Arguments<A>, const Arguments<A>&>;
  const auto arguments_of = [&](int64_t row) -> OfRow {
    if constexpr (own)
      return a.of_row(row);
    else
      return a;
  };
  while (row < end) {
    const OfRow of_row = arguments_of(row);
    int64_t after = end;
    RowState<double> sums{};
    for (int64_t b = 0; b < memory.blocks; ++b) {
      Maxima<A, S> of_next;
      if (b + 1 < memory.blocks)
        of_next.of = source.block(row, (b + 1) * memory.width);
      else if ((after = find(row + 1)) < end)
        of_next.of = source.block(after, 0);
      const RowState<double> found = sums_of<D, own>(maxima, of_row, memory.block(b), of_next);
      memory.student_max[b] = A(found.student_max);
      memory.teacher_max[b] = A(found.teacher_max);
      if (b == 0)
        sums = found;
      else
        merge<D>(sums, found, of_row.rates);
      maxima = of_next;
    }
    finish_row<D>(of_row, row, sums, memory);
    row = after;
  }
}

}  // namespace fastkd::FASTKD_ISA
