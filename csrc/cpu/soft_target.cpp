// Soft targets and hard labels: which form a call takes, and backward from the rows' statistics.
#include "soft_target_columns.h"
#include "soft_target_row.h"
#include "soft_target_rows.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Gradients of a row from its statistics, for a grad_output of `factor`.
template <class A>
void backward_row(const Tensors& t, const Plan<A>& plan, const int64_t (&offset)[4],
                  const int64_t (&stride)[4], int64_t label, const A* statistics, A factor) {
  using vec = vec_t<A>;
  constexpr int W = Simd<A>::width;
  const A s_max = statistics[kStudentMax], t_max = statistics[kTeacherMax];
  const double soft = plan.soft_gradient * double(factor);
  const double hard = plan.hard_gradient * double(factor);
  const vec infinity = splat<A>(INFINITY), zero = splat<A>(0);
  const A scale = A(kLogitScale), s_shift = s_max * scale, t_shift = t_max * scale;
  const A inverse_t = A(plan.inverse_temperature);
  const A log_ratio =
      A(std::log(double(statistics[kStudentSum]) / statistics[kTeacherSum]) * kLogitScale -
        double(statistics[kKl]));
  Combination<A, A> k{soft != 0,
                      plan.third_exponential,
                      A(soft / statistics[kStudentSum]),
                      A(soft / statistics[kTeacherSum]),
                      A(plan.hard ? hard / statistics[kHardSum] : 0),
                      A(hard * plan.smoothing / double(plan.classes))};
  if (plan.hard && !plan.third_exponential) k.student += k.hard;
  constexpr int room = kMostBlock;
  alignas(64) A student[room], teacher[room], es[room], et[room], eh[room];
  const int64_t size = thresholds.block;
  for (int64_t first = 0; first < plan.classes; first += size) {
    const int n = int(plan.classes - first < size ? plan.classes - first : size);
    gather(*t.student, offset[0] + first * stride[0], stride[0], n, student);
    gather(*t.teacher, offset[1] + first * stride[1], stride[1], n, teacher);
    for (int i = n; i < room && i % W; ++i) student[i] = teacher[i] = 0;
    for (int i = 0; i < n; i += W) {
      const vec s = load(student + i) * scale - s_shift, y = load(teacher + i) * scale - t_shift;
      const vec p = plan.softened(y);
      store(plan.softened(s), es + i);
      store(p, et + i);
      if (plan.third_exponential) store(plan.sharp(s), eh + i);
      if (t.to_teacher) {
        const vec surplus = (y - s) * inverse_t + log_ratio;  // log p − log q − KL, scaled
        const vec g = p * k.teacher * surplus * A(1 / kLogitScale);
        const vec wanted = load(teacher + i) == -infinity ? zero : g;
        store(soft == 0 ? zero : wanted, teacher + i);
      }
    }
    if (t.to_teacher) scatter(teacher, n, *t.to_teacher, offset[3] + first * stride[3], stride[3]);
    if (!t.gradient) continue;
    combine(Exponentials<A>{es, et, eh}, k, n, student, false);
    if (plan.hard && label >= first && label < first + n)
      student[label - first] -= A(hard * (1 - plan.smoothing));
    scatter(student, n, *t.gradient, offset[2] + first * stride[2], stride[2]);
  }
}

template <class A, class S>
void forward_side_by_side(const Tensors& t, const Rows<3>& rows, const Plan<A>& plan,
                          const int64_t* labels, A* table, int threads) {
  if (rows.classes > thresholds.few_classes)
    return parallel_stretches(rows.count, threads, [&](int64_t begin, int64_t end) {
      forward_stretch<A, S, false>(t, rows, plan, labels, begin, end, table);
    });
  constexpr int64_t W = Simd<A>::width;
  parallel_for((rows.count + W - 1) / W, threads, [&](int64_t group) {
    const int64_t first = group * W, left = rows.count - first;
    forward_rows<A, S>(t, rows, plan, labels ? labels + first : nullptr, first,
                       int(left < W ? left : W), table + first * kCount);
  });
}

// Without a table the statistics are forgotten.
template <class A>
void forward(const Tensors& t, const int64_t* labels, A* loss, A* table,
             const SoftTargetParameters& p) {
  const Tensor& gradient = t.gradient ? *t.gradient : *t.student;
  const Rows<3> rows({t.student, t.teacher, &gradient}, p.dim);
  const Plan<A> plan(rows.count, rows.classes, labels, p);
  const int threads = threads_for(rows.count * rows.classes, p.threads);
  Array<A> own(table == nullptr ? rows.count * kCount + kParts : 0);
  if (table == nullptr) table = own.data();
  bool gathers = t.student->dtype != t.teacher->dtype;
  for (int64_t stride : rows.class_stride) gathers |= stride != 1;
  if (rows.columns() && rows.classes <= thresholds.column_classes) {
    forward_columns(t, rows, plan, labels, table, threads);
  } else if (gathers) {
    parallel_stretches(rows.count, threads, [&](int64_t begin, int64_t end) {
      forward_stretch<A, A, true>(t, rows, plan, labels, begin, end, table);
    });
  } else {
    with_storage(t.student->dtype, [&](auto* storage) {
      using S = std::remove_pointer_t<decltype(storage)>;
      if constexpr ((sizeof(S) == 8) == (sizeof(A) == 8))
        forward_side_by_side<A, S>(t, rows, plan, labels, table, threads);
    });
  }
  zero_if_off(plan, rows, t.gradient, 2);
  reduce(table, rows.count, plan, p, loss);
}

template <class A>
void backward(const Tensor& grad_output, const Tensors& t, const int64_t* labels, const A* table,
              const SoftTargetParameters& p) {
  const Tensor& to_student = t.gradient ? *t.gradient : *t.student;
  const Tensor& to_teacher = t.to_teacher ? *t.to_teacher : *t.teacher;
  const Rows<4> rows({t.student, t.teacher, &to_student, &to_teacher}, p.dim);
  const Plan<A> plan(rows.count, rows.classes, labels, p);
  const A* factors = at<A>(grad_output, 0);
  const bool by_row = p.reduction == Reduction::none;
  const int threads = threads_for(rows.count * rows.classes, p.threads);
  parallel_for(rows.count, threads, [&](int64_t row) {
    int64_t offsets[4];
    rows.offsets(row, offsets);
    if (plan.ignores(labels, row)) {
      if (t.gradient) zero_row<A>(*t.gradient, offsets[2], rows.class_stride[2], rows.classes);
      if (t.to_teacher) zero_row<A>(*t.to_teacher, offsets[3], rows.class_stride[3], rows.classes);
      return;
    }
    backward_row(t, plan, offsets, rows.class_stride, labels ? labels[row] : 0,
                 table + row * kCount, by_row ? factors[row] : factors[0]);
  });
  zero_if_off(plan, rows, t.gradient, 2);
  zero_if_off(plan, rows, t.to_teacher, 3);
}

bool in_double(const Tensor& a, const Tensor& b) {
  return a.dtype == DType::f64 || b.dtype == DType::f64;
}

void forward_any(const Tensor& student, const Tensor& teacher, const int64_t* labels, void* loss,
                 void* statistics, const Tensor& gradient, const SoftTargetParameters& p) {
  const Tensors t{&student, &teacher, gradient ? &gradient : nullptr, nullptr};
  if (in_double(student, teacher))
    forward<double>(t, labels, static_cast<double*>(loss), static_cast<double*>(statistics), p);
  else
    forward<float>(t, labels, static_cast<float*>(loss), static_cast<float*>(statistics), p);
}

void backward_any(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                  const int64_t* labels, const void* statistics, const Tensor& to_student,
                  const Tensor& to_teacher, const SoftTargetParameters& p) {
  const Tensors t{&student, &teacher, to_student ? &to_student : nullptr,
                  to_teacher ? &to_teacher : nullptr};
  if (in_double(student, teacher))
    backward<double>(grad_output, t, labels, static_cast<const double*>(statistics), p);
  else
    backward<float>(grad_output, t, labels, static_cast<const float*>(statistics), p);
}

}  // namespace

extern const SoftTargetKernels soft_target_kernels{forward_any, backward_any};

}  // namespace fastkd::FASTKD_ISA
