// One row of the general form: its sums, and its classes as they are read again.
#pragma once

#include "soft_target_general.h"
#include "soft_target_passes.h"

namespace fastkd::cuda::logits {

// What is known of one row, in every thread that has a part in it.
template <class A>
struct GeneralRow {
  const uint32_t row;
  const RowRates<A> rates;
  const int64_t label;
  Start<kSides> start;
  int64_t teacher_start;  // of one teacher
  RowState<A> state;      // of several teachers, `teacher` is the sum of their mean
  RowTarget<A> target;
  double divergence, mean;  // scaled, and what the gradient takes
  double weight = 1;        // of the gradient, besides the call's

  __device__ __forceinline__ GeneralRow(const GeneralCall& of, uint32_t row)
      : row(row), rates(of, row), label(label_in_shard(of.mean.call, row)) {
    locate(of.mean.call, row, start.at);
    teacher_start = start_of_teacher(of.mean, row, 0);
  }

  __device__ __forceinline__ double log_ratio() const {
    return log(double(state.student) / double(state.teacher)) * kLogitScale;
  }
};

// N classes: logits relative to the maxima, each at its own temperature, and exponentials.
template <class A, int N>
struct GeneralClasses {
  A x[N], y[N], es[N], et[N];
};

template <class A, bool kIsColumns>
struct GeneralPasses : RowPasses<A, kIsColumns> {
  using Base = RowPasses<A, kIsColumns>;
  using Base::call, Base::N, Base::with_logits;
  using Row = GeneralRow<A>;
  using Classes = GeneralClasses<A, N>;

  const GeneralCall& general;

  __device__ __forceinline__ GeneralPasses(const GeneralCall& of, PassesShared<A>& shared,
                                           int64_t vectors)
      : Base(of.mean, shared, vectors), general(of) {}

  // Maxima and sums of both sides.
  __device__ __forceinline__ void find_sums(Row& of) const {
    RowState<A> teacher;
    if (general.has_statistics()) {
      const A* const from = static_cast<const A*>(call.statistics) + int64_t(of.row) * kCount;
      of.state.student_max = from[kStudentMax];
      of.state.student = from[kStudentSum];
      of.state.teacher_max = from[kTeacherMax];
      of.state.teacher = from[kTeacherSum];
      of.state.hard = from[kHardSum];
    } else {
      const int phase = of.start.phase;
      if (general.has_one_teacher()) {
        teacher = this->template sums_of<false>(teacher_reader(of), phase, of.rates.teacher,
                                                MergeTeacherLanes<A>{of.rates.teacher});
      } else {
        this->find_normalisers(of.row, phase, of.rates.teacher);
        teacher.student_max = 0;
        teacher.student = 1;
      }
      of.state = this->template sums_of<true>(student_reader(of), phase, of.rates.student,
                                              MergeStudentLanes<A>{of.rates.student, with_logits});
      of.state.teacher_max = teacher.student_max;
      of.state.teacher = teacher.student;
    }
    of.target = {1 / of.state.student,
                 general.is_stated() ? A(exp(double(of.state.teacher_max))) : 1 / of.state.teacher,
                 general.has_one_teacher() ? A(of.rates.ratio) : A(1),
                 Shares<A>{A(general.beta), A(1 - general.beta)}};
  }

  __device__ __forceinline__ void read_classes(const Row& of, int64_t i, Classes& to) const {
    student_reader(of)(i, to.x);
    const A s_shift = shift(of.state.student_max);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      to.x[k] = shifted(to.x[k], s_shift);
      to.es[k] = of.rates.student.exp_soft(to.x[k]);
    }
    if (!general.has_one_teacher()) {
      this->target(of.row, of.start.phase, i, of.rates.teacher, to.et);
      if (call.divergence == Divergence::forward_kl || call.divergence == Divergence::reverse_kl)
        find_logits(of, i, to);
      return;
    }
    teacher_reader(of)(i, to.y);
    const A t_shift = shift(of.state.teacher_max);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      to.y[k] = shifted(to.y[k], t_shift);
      to.et[k] = of.rates.teacher.of_teacher(to.y[k]);
    }
  }

 private:
  __device__ __forceinline__ auto student_reader(const Row& of) const {
    return this->reader(call.sides[kStudent], of.start.at[kStudent], of.start.phase);
  }
  // Of one teacher.
  __device__ __forceinline__ auto teacher_reader(const Row& of) const {
    const auto reader =
        this->reader(general.mean.teachers[0].tensor, of.teacher_start, of.start.phase);
    return [=](int64_t i, A(&to)[N]) {
      reader(i, to);
      if (general.teacher_is != TeacherIs::probabilities) return;
#pragma unroll
      for (int k = 0; k < N; ++k)
        if (i + k >= 0 && i + k < call.classes) to[k] = log(to[k]);
    };
  }

  // T log p, of the mean p of several teachers. Where it underflows its logarithm counts if the
  // student's exponentials weigh that.
  __device__ __forceinline__ void find_logits(const Row& of, int64_t i, Classes& to) const {
    constexpr A kLeast = kLeastNormal<A>;
    const A unit = A(kLogitScale / kLog2E / of.rates.inverse);
    unsigned low = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A p = to.et[k];
      to.y[k] = log2(p < kLeast ? kLeast : p) * unit;
      if (p < kLeast * A(0x1p24) && !signbit(p)) low |= 1u << k;
    }
    if (call.divergence != Divergence::reverse_kl) return;
#pragma unroll 1
    for (; low != 0; low &= low - 1) {
      const int which = __ffs(int(low)) - 1;
      const A found = logarithm(of, i + which) * unit;
#pragma unroll
      for (int k = 0; k < N; ++k) to.y[k] = k == which ? found : to.y[k];
    }
  }

  // log2 p of one class, by the logarithms of the teachers' own probabilities.
  __device__ __forceinline__ A logarithm(const Row& of, int64_t of_class) const {
    A highest = A(-INFINITY), total = 0;
#pragma unroll 1
    for (int m = 0; m < general.mean.count; ++m) {
      const Tensor& teacher = general.mean.teachers[m].tensor;
      const auto elements = elements_of<Any>(teacher, start_of_teacher(general.mean, of.row, m));
      const Normaliser<A> by = this->normaliser(m);
      const A below = shifted(A(elements.load(of_class * teacher.class_stride)), by.shift);
      const A x = below * of.rates.teacher.at_temperature + log2(by.by);
      if (x == A(-INFINITY)) continue;
      const A both = x > highest ? x : highest;
      total = total * exp2_of(highest - both) + exp2_of(x - both);
      highest = both;
    }
    return highest + log2(total);
  }
};

}  // namespace fastkd::cuda::logits
