// Soft targets and hard labels, a row at a time: one pass over the logits leaves the exponentials
// in cache, a second over the cache writes the gradient.
//
// A row is taken in blocks. Each block's exponentials are relative to the block's own maximum, and
// are brought to the row's maximum when that is known, so that no logit is read twice.
#include "soft_target.h"

#include "soft_target_columns.h"

namespace fastkd::FASTKD_ISA {
namespace {

// What a pass over one row finds, in double: a row has few blocks.
struct RowSums {
  double student_max = -INFINITY, student_sum = 0, hard_sum = 0, shifted_sum = 0;
  double teacher_max = -INFINITY, teacher_sum = 0, weighted_difference = 0;
  bool student_excludes = false;
};

// One block of both sides in arithmetic precision, padded with -inf to whole vectors.
template <class A>
struct Block {
  alignas(64) A student[kBlock];
  alignas(64) A teacher[kBlock];
  A student_max, teacher_max;
  int size, padded;

  // Where the logits after this block lie, if they follow it: fetched while this one is computed.
  const char *next_student, *next_teacher;

  void read(const Tensor& s, const Tensor& t, int64_t s_at, int64_t t_at, int64_t s_stride,
            int64_t t_stride, int n) {
    constexpr int W = Simd<A>::width;
    size = n;
    padded = (n + W - 1) / W * W;
    gather(s, s_at, s_stride, n, student);
    gather(t, t_at, t_stride, n, teacher);
    for (int i = n; i < padded; ++i) student[i] = teacher[i] = -INFINITY;
    next_student = s.data + (s_at + n) * size_of(s.dtype);
    next_teacher = t.data + (t_at + n) * size_of(t.dtype);
  }

  void find_maxima() {
    constexpr int W = Simd<A>::width;
    auto s = splat<A>(-INFINITY), t = s;
    for (int i = 0; i < padded; i += W) {
      s = max<A>(load(student + i), s);
      t = max<A>(load(teacher + i), t);
    }
    student_max = max_of<A>(s);
    teacher_max = max_of<A>(t);
  }
};

// The maximum to subtract: where every class is excluded, 0 leaves exp(-inf) = 0.
template <class A>
inline A shift(A maximum) {
  return maximum == A(-INFINITY) ? A(0) : maximum;
}

template <class A>
struct Exponentials {
  A *student, *teacher, *hard;
};

// Σ p·(log p − log q) of a block, unnormalised, where a class may be excluded: by the teacher it
// contributes 0 (and 0 · inf would be NaN), by the student alone it is infinite.
template <class A>
A difference_with_exclusions(const Block<A>& block, const A* et, A s_shift, A t_shift) {
  A total = 0;
  for (int i = 0; i < block.size; ++i) {
    const A s = block.student[i], t = block.teacher[i];
    if (t == A(-INFINITY)) continue;
    total += s == A(-INFINITY) ? A(INFINITY) : et[i] * ((t - t_shift) - (s - s_shift));
  }
  return total;
}

// Exponentials of a block relative to its maxima, and its share of the row's sums.
template <class A>
void exponentiate(const Block<A>& block, const Plan<A>& plan, Exponentials<A> to, RowSums& row) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const A s_shift = shift(block.student_max), t_shift = shift(block.teacher_max);
  vec s_sum = {}, t_sum = {}, hard_sum = {}, difference_sum = {};
  const auto step = [&](int i, bool padded) {
    const vec s = load(block.student + i) - s_shift, t = load(block.teacher + i) - t_shift;
    const vec es = plan.softened(s), et = plan.softened(t);
    s_sum += es;
    t_sum += et;
    const vec product = et * (t - s);
    difference_sum += padded && i + W > block.size ? keep<A>(product, block.size - i) : product;
    store(es, to.student + i);
    store(et, to.teacher + i);
    if (plan.third_exponential) {
      const vec eh = plan.sharp(s);
      hard_sum += eh;
      store(eh, to.hard + i);
    }
  };
  int i = 0;
  for (; i + W <= block.size; i += W) {
    __builtin_prefetch(block.next_student + i * sizeof(A));
    __builtin_prefetch(block.next_teacher + i * sizeof(A));
    step(i, false);
  }
  if (i < block.size) step(i, true);
  if (!plan.third_exponential) hard_sum = s_sum;

  const double weight = sum<A>(t_sum);
  double difference = sum<A>(difference_sum);
  if (!std::isfinite(difference))
    difference = difference_with_exclusions(block, to.teacher, s_shift, t_shift);
  if (difference == INFINITY) row.student_excludes = true;
  const double inverse_t = plan.inverse_temperature;
  const double s_max = block.student_max > row.student_max ? block.student_max : row.student_max;
  const double t_max = block.teacher_max > row.teacher_max ? block.teacher_max : row.teacher_max;
  const auto rescale = [](double from, double to, double inverse) {
    return from == to ? 1.0 : from == -INFINITY ? 0.0 : std::exp((from - to) * inverse);
  };
  const double s_old = rescale(row.student_max, s_max, inverse_t);
  const double s_new = rescale(block.student_max, s_max, inverse_t);
  const double t_old = rescale(row.teacher_max, t_max, inverse_t);
  const double t_new = rescale(block.teacher_max, t_max, inverse_t);
  // The differences are relative to each side's maxima, and move with them.
  const auto moved = [&](double value, double mass, double t_from, double s_from, double factor) {
    if (factor == 0 || mass == 0) return factor * mass;
    return factor * (value + mass * ((t_from - t_max) - (s_from - shift(s_max))));
  };
  const double old_part = moved(row.weighted_difference, row.teacher_sum, row.teacher_max,
                                shift(row.student_max), t_old);
  const double new_part = moved(difference, weight, block.teacher_max, s_shift, t_new);
  row.weighted_difference = old_part + new_part;
  row.student_sum = row.student_sum * s_old + double(sum<A>(s_sum)) * s_new;
  row.teacher_sum = row.teacher_sum * t_old + weight * t_new;
  if (plan.hard) {
    const double h_old = rescale(row.student_max, s_max, 1),
                 h_new = rescale(block.student_max, s_max, 1);
    row.hard_sum = row.hard_sum * h_old + double(sum<A>(hard_sum)) * h_new;
  }
  row.student_max = s_max;
  row.teacher_max = t_max;
}

// Gradient of a block: a·es − b·et + c·eh − d, and the label's share.
template <class A>
struct Combination {
  A student, teacher, hard, smoothing;
};

template <class A>
void combine(const Exponentials<A>& from, const Combination<A>& k, bool third, int padded, A* out) {
  constexpr int W = Simd<A>::width;
  const bool soft =
      k.teacher != 0;  // otherwise nothing that the teacher holds may show, NaN neither
  for (int i = 0; i < padded; i += W) {
    auto g = load(from.student + i) * k.student;
    if (soft) g -= load(from.teacher + i) * k.teacher;
    if (third) g += load(from.hard + i) * k.hard;
    store(g - k.smoothing, out + i);
  }
}

template <class A>
void forward_row(const Tensors& t, const Plan<A>& plan, const int64_t (&at)[3],
                 const int64_t (&stride)[3], int64_t label, A* statistics) {
  const int64_t classes = plan.classes, blocks = (classes + kBlock - 1) / kBlock;
  // Without a gradient nobody asks for the exponentials again: one block's room will do.
  const bool write = bool(t.gradient);
  const int64_t room = write ? blocks * kBlock : kBlock;
  A* memory = scratch<A>((plan.third_exponential ? 3 : 2) * room + 2 * blocks);
  A *student_max = memory + (plan.third_exponential ? 3 : 2) * room,
    *teacher_max = student_max + blocks;
  RowSums row;
  Block<A> block;
  const auto exponentials = [&](int64_t b) {
    A* base = memory + (write ? b * kBlock : 0);
    return Exponentials<A>{base, base + room, base + 2 * room};
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * kBlock;
    const int n = int(classes - first < kBlock ? classes - first : kBlock);
    block.read(*t.student, *t.teacher, at[0] + first * stride[0], at[1] + first * stride[1],
               stride[0], stride[1], n);
    block.find_maxima();
    exponentiate(block, plan, exponentials(b), row);
    student_max[b] = block.student_max;
    teacher_max[b] = block.teacher_max;
    if (plan.smoothing > 0)
      for (int i = 0; i < n; ++i) row.shifted_sum += block.student[i];
  }
  statistics[kStudentMax] = A(row.student_max);
  statistics[kStudentSum] = A(row.student_sum);
  statistics[kTeacherMax] = A(row.teacher_max);
  statistics[kTeacherSum] = A(row.teacher_sum);
  statistics[kHardSum] = A(row.hard_sum);
  double kl = row.weighted_difference / row.teacher_sum * plan.inverse_temperature +
              std::log(row.student_sum / row.teacher_sum);
  if (row.student_excludes) kl += INFINITY;
  statistics[kKl] = A(kl < 0 ? 0 : kl);  // rounding may leave a tiny negative number
  statistics[kCe] = 0;
  if (plan.hard) {
    A logit;
    gather(*t.student, at[0] + label * stride[0], 1, 1, &logit);
    const double log_sum = std::log(row.hard_sum) + row.student_max;
    statistics[kCe] =
        A(plan.cross_entropy(log_sum - double(logit), log_sum - row.shifted_sum / double(classes)));
  }
  if (!write) return;

  alignas(64) A out[kBlock];
  const double inverse_t = plan.inverse_temperature;
  for (int64_t b = 0; b < blocks; ++b) {
    const double s_from = double(student_max[b]) - row.student_max;
    const double t_from = double(teacher_max[b]) - row.teacher_max;
    const double es = blocks == 1 ? 1 : std::exp(s_from * inverse_t);
    const double et = blocks == 1 ? 1 : std::exp(t_from * inverse_t);
    const double eh = blocks == 1 ? 1 : std::exp(s_from);
    Combination<A> k{A(plan.soft_gradient * es / row.student_sum),
                     A(plan.soft_gradient == 0 ? 0 : plan.soft_gradient * et / row.teacher_sum),
                     A(plan.hard ? plan.hard_gradient * eh / row.hard_sum : 0),
                     A(plan.hard_gradient * plan.smoothing / double(classes))};
    if (plan.hard && !plan.third_exponential) k.student += k.hard;
    const int64_t first = b * kBlock;
    const int n = int(classes - first < kBlock ? classes - first : kBlock);
    constexpr int W = Simd<A>::width;
    combine(exponentials(b), k, plan.third_exponential, (n + W - 1) / W * W, out);
    if (plan.hard && label >= first && label < first + n)
      out[label - first] -= A(plan.hard_gradient * (1 - plan.smoothing));
    scatter(out, n, *t.gradient, at[2] + first * stride[2], stride[2], plan.streams);
  }
}

// Gradients of a row from its statistics, for a grad_output of `factor`.
template <class A>
void backward_row(const Tensors& t, const Plan<A>& plan, const int64_t (&at)[4],
                  const int64_t (&stride)[4], int64_t label, const A* statistics, A factor) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const A s_max = statistics[kStudentMax], t_max = statistics[kTeacherMax];
  const double soft = plan.soft_gradient * double(factor);
  const double hard = plan.hard_gradient * double(factor);
  const vec infinity = splat<A>(INFINITY), zero = splat<A>(0);
  const A inverse_t = A(plan.inverse_temperature);
  const A log_ratio = A(std::log(double(statistics[kStudentSum]) / statistics[kTeacherSum]) -
                        double(statistics[kKl]));
  Combination<A> k{A(soft / statistics[kStudentSum]),
                   A(soft == 0 ? 0 : soft / statistics[kTeacherSum]),
                   A(plan.hard ? hard / statistics[kHardSum] : 0),
                   A(hard * plan.smoothing / double(plan.classes))};
  if (plan.hard && !plan.third_exponential) k.student += k.hard;
  Block<A> block;
  alignas(64) A es[kBlock], et[kBlock], eh[kBlock], out[kBlock];
  for (int64_t first = 0; first < plan.classes; first += kBlock) {
    const int n = int(plan.classes - first < kBlock ? plan.classes - first : kBlock);
    block.read(*t.student, *t.teacher, at[0] + first * stride[0], at[1] + first * stride[1],
               stride[0], stride[1], n);
    for (int i = 0; i < block.padded; i += W) {
      const vec s = load(block.student + i) - s_max, y = load(block.teacher + i) - t_max;
      const vec p = plan.softened(y);
      store(plan.softened(s), es + i);
      store(p, et + i);
      if (plan.third_exponential) store(plan.sharp(s), eh + i);
      if (t.to_teacher) {
        const vec log_p_over_q = (y - s) * inverse_t + log_ratio;
        const vec g = p * k.teacher * log_p_over_q;
        const vec wanted = load(block.teacher + i) == -infinity ? zero : g;
        store(soft == 0 ? zero : wanted, block.teacher + i);
      }
    }
    if (t.to_teacher)
      scatter(block.teacher, n, *t.to_teacher, at[3] + first * stride[3], stride[3]);
    if (!t.gradient) continue;
    combine(Exponentials<A>{es, et, eh}, k, plan.third_exponential, block.padded, out);
    if (plan.hard && label >= first && label < first + n)
      out[label - first] -= A(hard * (1 - plan.smoothing));
    scatter(out, n, *t.gradient, at[2] + first * stride[2], stride[2], plan.streams);
  }
}

template <class A>
void zero_row(const Tensor& gradient, int64_t at, int64_t stride, int64_t classes) {
  alignas(64) A zeros[kBlock] = {};
  for (int64_t first = 0; first < classes; first += kBlock)
    scatter(zeros, int(classes - first < kBlock ? classes - first : kBlock), gradient,
            at + first * stride, stride);
}

template <class A>
void forward(const Tensors& t, const int64_t* labels, const Tensor& loss, const Tensor& parts,
             const Tensor& statistics, const SoftTargetParameters& p) {
  const Tensor& gradient = t.gradient ? *t.gradient : *t.student;
  const Rows<3> rows({t.student, t.teacher, &gradient}, p.dim);
  const Plan<A> plan(rows.count, rows.classes, labels, p, t.gradient);
  A* table = at<A>(statistics, 0);
  const int threads = threads_for(rows.count * rows.classes, p.threads);
  if (rows.columns() && rows.classes <= kMostColumnClasses) {
    forward_columns(t, rows, plan, labels, p.ignore_index, table, threads);
  } else {
    parallel_for(rows.count, threads, [&](int64_t row) {
      int64_t offsets[3];
      rows.offsets(row, offsets);
      A* to = table + row * kCount;
      if (labels && labels[row] == p.ignore_index) {
        for (int i = 0; i < kCount; ++i) to[i] = 0;
        if (t.gradient) zero_row<A>(*t.gradient, offsets[2], rows.class_stride[2], rows.classes);
        return;
      }
      forward_row(t, plan, offsets, rows.class_stride, labels ? labels[row] : 0, to);
    });
  }
  reduce(table, rows.count, plan, p, at<A>(loss, 0), at<A>(parts, 0));
}

template <class A>
void backward(const Tensor& grad_output, const Tensors& t, const int64_t* labels,
              const Tensor& statistics, const SoftTargetParameters& p) {
  const Tensor& to_student = t.gradient ? *t.gradient : *t.student;
  const Tensor& to_teacher = t.to_teacher ? *t.to_teacher : *t.teacher;
  const Rows<4> rows({t.student, t.teacher, &to_student, &to_teacher}, p.dim);
  const Plan<A> plan(rows.count, rows.classes, labels, p, t.gradient);
  const A* table = at<A>(statistics, 0);
  const A* factors = at<A>(grad_output, 0);
  const bool by_row = p.reduction == Reduction::none;
  const int threads = threads_for(rows.count * rows.classes, p.threads);
  parallel_for(rows.count, threads, [&](int64_t row) {
    int64_t offsets[4];
    rows.offsets(row, offsets);
    if (labels && labels[row] == p.ignore_index) {
      if (t.gradient) zero_row<A>(*t.gradient, offsets[2], rows.class_stride[2], rows.classes);
      if (t.to_teacher) zero_row<A>(*t.to_teacher, offsets[3], rows.class_stride[3], rows.classes);
      return;
    }
    backward_row(t, plan, offsets, rows.class_stride, labels ? labels[row] : 0,
                 table + row * kCount, by_row ? factors[row] : factors[0]);
  });
}

bool in_double(const Tensor& a, const Tensor& b) {
  return a.dtype == DType::f64 || b.dtype == DType::f64;
}

void forward_any(const Tensor& student, const Tensor& teacher, const int64_t* labels,
                 const Tensor& loss, const Tensor& parts, const Tensor& statistics,
                 const Tensor& gradient, const SoftTargetParameters& p) {
  const Tensors t{&student, &teacher, gradient ? &gradient : nullptr, nullptr};
  if (in_double(student, teacher))
    forward<double>(t, labels, loss, parts, statistics, p);
  else
    forward<float>(t, labels, loss, parts, statistics, p);
}

void backward_any(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                  const int64_t* labels, const Tensor& statistics, const Tensor& to_student,
                  const Tensor& to_teacher, const SoftTargetParameters& p) {
  const Tensors t{&student, &teacher, to_student ? &to_student : nullptr,
                  to_teacher ? &to_teacher : nullptr};
  if (in_double(student, teacher))
    backward<double>(grad_output, t, labels, statistics, p);
  else
    backward<float>(grad_output, t, labels, statistics, p);
}

}  // namespace

extern const SoftTargetKernels soft_target_kernels{forward_any, backward_any};

}  // namespace fastkd::FASTKD_ISA
