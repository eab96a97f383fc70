// Soft targets and hard labels: which form a call takes, and backward from the rows' statistics.
#include "soft_target_columns.h"
#include "soft_target_row.h"
#include "soft_target_rows.h"
#include "soft_target_shards.h"
#include "soft_target_teachers.h"

namespace fastkd::FASTKD_ISA {
namespace {

// The losses of all rows, and the student's gradient if it is wanted.
template <class D, class A>
void forward_rows_of(const Arguments<A>& a, int threads) {
  const Rows& rows = a.rows;
  // Where the mean of teachers underflows its logarithm counts, or it does not.
  const bool has_logits = a.teachers == 1 || D::kByTeacher;
  const bool is_capped = a.to_student && a.p.softcap != 0;
  if (rows.columns() && rows.classes <= thresholds.column_classes && !a.differs_by_row() &&
      has_logits && !a.own && !is_capped)
    return forward_columns<D>(a, threads);
  if (a.teachers > 1)
    return parallel_for(rows.count, threads, [&](int64_t row) {
      if (a.ignores(row))
        a.skip(row);
      else if (a.own)
        mean_row<D>(a.of_row(row), row);
      else
        mean_row<D>(a, row);
    });
  if (a.own)
    return parallel_stretches(rows.count, threads, [&](int64_t begin, int64_t end) {
      forward_stretch<D, A, true, true>(a, begin, end);
    });
  const DType dtype = rows.sides[kStudent].tensor->dtype;
  bool gathers = dtype != rows.sides[kTeacher].tensor->dtype;
  for (const Side& side : rows.sides) gathers |= side.class_stride != 1;
  if (gathers)
    return parallel_stretches(rows.count, threads, [&](int64_t begin, int64_t end) {
      forward_stretch<D, A, true>(a, begin, end);
    });
  with_storage(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if constexpr ((sizeof(S) == 8) == (sizeof(A) == 8)) {
      if (rows.classes > thresholds.few_classes || a.differs_by_row() || is_capped)
        return parallel_stretches(rows.count, threads, [&](int64_t begin, int64_t end) {
          forward_stretch<D, S, false>(a, begin, end);
        });
      constexpr int64_t W = Simd<A>::width;
      parallel_for((rows.count + W - 1) / W, threads, [&](int64_t group) {
        const int64_t first = group * W, left = rows.count - first;
        forward_rows<D, S>(a, first, int(left < W ? left : W));
      });
    }
  });
}

// The gradients of a row from its statistics. Of a divergence of probabilities these have, in the
// place of the divergence, the mean that the gradient takes.
template <class D, bool own, class A>
void backward_row(const Arguments<A>& a, int64_t row, const A* statistics) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const auto& sides = a.rows.sides;
  const auto scatter_side = [&](const A* from, int which, int64_t first, int n) {
    const Side& side = sides[size_t(which)];
    const int64_t stride = side.class_stride;
    scatter(from, n, *side.tensor, a.rows.offset(side, row) + first * stride, stride);
  };
  const Weights by = a.weights_of(row);
  const double zs = statistics[kStudentSum], zt = statistics[kTeacherSum];
  const double log_ratio = std::log(zs / zt) * kLogitScale;
  double mean = statistics[kKl];
  if constexpr (!D::kNormalizes) mean = D::mean_of(mean, log_ratio);
  const auto soft = D::factors(by.soft, zs, zt, mean, a.rates.inverse);
  const Factors<A> k = a.factors(SoftFactors<A>{A(soft.student), A(soft.teacher)},
                                 A(a.labels ? by.hard / statistics[kHardSum] : 0), by);
  [[maybe_unused]] const A ratio = A(a.rates.ratio);
  const double by_teacher = by.soft * a.rates.ratio;
  const A of_student = A(by_teacher / zs), of_teacher = A(by_teacher / zt);
  const A surplus = A(log_ratio - double(statistics[kKl])), inverse = A(a.rates.inverse);
  const A scale = A(kLogitScale);
  const A s_shift = statistics[kStudentMax] * scale, t_shift = statistics[kTeacherMax] * scale;
  const vec zero = {};
  [[maybe_unused]] const A to_es = A(soft.student), to_kept = A(soft.teacher);
  [[maybe_unused]] double by_student = 0,
                          by_own = 0;  // the sums that the temperatures' gradients take
  alignas(64) A student[kMostBlock], teacher[kMostBlock];
  alignas(64) A es[kMostBlock], kept[kMostBlock], eh[kMostBlock];
  const int64_t size = thresholds.block;
  for (int64_t first = 0; first < a.classes; first += size) {
    const int n = int(a.classes - first < size ? a.classes - first : size);
    gather_block(a, kStudent, row, first, n, student);
    gather_block(a, kTeacher, row, first, n, teacher);
    for (int i = n; i < kMostBlock && i % W; ++i) student[i] = teacher[i] = 0;
    [[maybe_unused]] vec of_temperature = zero, of_teacher_temperature = zero;
    for (int i = 0; i < n; i += W) {
      const vec s = load(student + i) * scale - s_shift, t = load(teacher + i) * scale - t_shift;
      const vec e = a.exp_soft(s);
      vec p, apart;
      if constexpr (own) {
        p = a.exp_teacher(t);
        apart = at_student(t, ratio) - s;
      } else {
        p = a.exp_soft(t);
        apart = t - s;
      }
      const vec keeps = D::kept(e, p, apart);
      store(e, es + i);
      store(keeps, kept + i);
      if (k.has_hard) store(a.exp_hard(s), eh + i);
      if constexpr (own && !D::kNormalizes)
        if (a.to_temperatures) {
          const auto product = [&](vec g, vec x, vec logits) {
            const vec found = g == 0 ? zero : logits == -INFINITY ? zero : g * x;
            return n - i < W ? keep<A>(found, n - i) : found;
          };
          const vec g = e * to_es + D::with_teacher(e, keeps, to_kept);
          const vec h = D::to_teacher(e, p, apart * inverse + surplus, of_student, of_teacher);
          of_temperature += product(g, s, load(student + i));
          of_teacher_temperature += product(h, t, load(teacher + i));
        }
      if constexpr (!D::kNormalizes)
        if (a.to_teacher) {
          const vec g = D::to_teacher(e, p, apart * inverse + surplus, of_student, of_teacher);
          const vec wanted = D::kByTeacher && load(teacher + i) == -INFINITY ? zero : g;
          store(k.soft ? wanted : zero, teacher + i);
        }
    }
    if constexpr (D::kNormalizes)
      with_terms(a.p.divergence, [&](auto terms) {
        add_terms<decltype(terms)>(Exponentials<A>{es, kept, eh}, n, A(1 / zs), A(1 / zt),
                                   shares_of(a));
      });
    if constexpr (own) {
      by_student += sum<A>(of_temperature);
      by_own += sum<A>(of_teacher_temperature);
    }
    if (a.to_teacher) {
      uncap(a, kTeacher, row, first, n, teacher);
      scatter_side(teacher, kToTeacher, first, n);
    }
    if (!a.to_student) continue;
    combine<D>(Exponentials<A>{es, kept, eh}, k, n, student, false);
    if (a.labels && a.labels[row] >= first && a.labels[row] < first + n)
      student[a.labels[row] - first] -= k.label;
    uncap(a, kStudent, row, first, n, student);
    scatter_side(student, kToStudent, first, n);
  }
  if (own && a.to_temperatures)
    a.write_temperatures(row, by.soft, by_student, by_own, statistics[kKl]);
}

// Where both terms are switched off nothing is left of a gradient, NaN neither.
template <class A>
void zero_if_off(const Arguments<A>& a, int threads) {
  if (a.weights.soft != 0 || a.weights.hard != 0) return;
  parallel_for(a.rows.count, threads, [&](int64_t row) { a.write_zeros(row); });
}

int threads_of(const Rows& rows, int64_t teachers, int available) {
  return threads_for(rows.count * rows.classes * (teachers + 1) / 2, available);
}

bool in_double(const Tensor& student, const Tensors& teachers) {
  bool found = student.dtype == DType::f64;
  for (const Tensor& teacher : teachers) found |= teacher.dtype == DType::f64;
  return found;
}

const Tensor absent{};

Rows rows_of(const Tensor& student, const Tensors& teachers, const Tensor& to_student,
             const Tensor& to_teacher, int dim) {
  std::vector<const Tensor*> sides(kTeacher + teachers.size());
  sides[kStudent] = &student;
  sides[kToStudent] = to_student ? &to_student : &student;
  sides[kToTeacher] = to_teacher ? &to_teacher : &teachers[0];
  for (size_t m = 0; m < teachers.size(); ++m) sides[kTeacher + m] = &teachers[m];
  return Rows(sides, dim);
}

// f(D{}, A{}) of the divergence and the arithmetic that a call has.
template <class F>
void with_arithmetic(const Tensor& student, const Tensors& teachers, const SoftTargetParameters& p,
                     const F& f) {
  const auto with = [&](auto divergence) {
    in_double(student, teachers) ? f(divergence, double()) : f(divergence, float());
  };
  switch (p.divergence) {
    case Divergence::forward_kl:
      return with(ForwardKl{});
    case Divergence::reverse_kl:
      return with(ReverseKl{});
    default:
      return with(Normalized{});
  }
}

void forward(const Tensor& student, const Tensors& teachers, const Labels& labels,
             const Tensors& temperatures, void* loss, void* parts, void* statistics,
             const Tensor& gradient, const Tensor& grad_output, const SoftTargetParameters& p,
             int available) {
  const Rows rows = rows_of(student, teachers, gradient, absent, p.dim);
  const int threads = threads_of(rows, int64_t(teachers.size()), available);
  with_arithmetic(student, teachers, p, [&](auto divergence, auto number) {
    using D = decltype(divergence);
    using A = decltype(number);
    Arguments<A> a(p, rows, labels, temperatures, gradient, absent, grad_output);
    Array<A> losses(statistics ? 0 : 2 * rows.count);
    a.losses = losses.data();
    if (statistics) {
      a.statistics = static_cast<A*>(statistics);
      a.losses = a.statistics + kKl;
      a.step = kCount;
      if (p.reduction != Reduction::none) a.statistics[rows.count * kCount] = A(labels.kept);
    }
    forward_rows_of<D>(a, threads);
    zero_if_off(a, threads);
    reduce(a, static_cast<A*>(loss), static_cast<A*>(parts), threads);
  });
}

void backward(const Tensor& grad_output, const Tensor& student, const Tensors& teachers,
              const Labels& labels, const Tensors& temperatures, const void* statistics,
              const Tensor& to_student, const Tensor& to_teacher, const Tensor& to_temperatures,
              const SoftTargetParameters& p, int available) {
  const Rows rows = rows_of(student, teachers, to_student, to_teacher, p.dim);
  const int threads = threads_of(rows, int64_t(teachers.size()), available);
  with_arithmetic(student, teachers, p, [&](auto divergence, auto number) {
    using D = decltype(divergence);
    using A = decltype(number);
    Arguments<A> a(p, rows, labels, temperatures, to_student, to_teacher, grad_output);
    a.to_temperatures = to_temperatures.as<A>();
    if (statistics)
      parallel_for(rows.count, threads, [&](int64_t row) {
        const A* const found = static_cast<const A*>(statistics) + row * kCount;
        if (a.ignores(row)) {
          a.skip(row);
          if (a.to_temperatures) a.write_temperatures(row, 0, 0, 0, 0);
        } else if (a.own)
          backward_row<D, true>(a.of_row(row), row, found);
        else
          backward_row<D, false>(a, row, found);
      });
    if (!statistics) forward_rows_of<D>(a, threads);
    zero_if_off(a, threads);
  });
}

void terms(const Tensor& student, const Tensors& teachers, const Labels& labels,
           const Tensors& temperatures, const void* statistics, double* to,
           const SoftTargetParameters& p, int available) {
  const Rows rows = rows_of(student, teachers, absent, absent, p.dim);
  const int threads = threads_of(rows, int64_t(teachers.size()), available);
  const auto fill = [&](auto number) {
    using A = decltype(number);
    const Arguments<A> a(p, rows, labels, temperatures, absent, absent, absent);
    with_terms(p.divergence, [&](auto terms) {
      parallel_for(rows.count, threads, [&](int64_t row) {
        const A* const of = static_cast<const A*>(statistics) + row * kCount;
        RowTerms found;
        if (!a.ignores(row)) found = terms_of_row<decltype(terms)>(a.of_row(row), row, of);
        to[2 * row] = found.phi;
        to[2 * row + 1] = found.psi;
      });
    });
  };
  in_double(student, teachers) ? fill(double()) : fill(float());
}

}  // namespace

extern const SoftTargetKernels soft_target_kernels{forward, backward, terms};

}  // namespace fastkd::FASTKD_ISA
