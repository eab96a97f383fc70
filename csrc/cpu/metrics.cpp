// Metrics of rows of logits: one pass over memory leaves the exponentials of a row in cache, where
// a second one finds the overlap.
//
// A row is taken in blocks. Each block's exponentials are relative to its own maxima, and are
// brought to the row's when those are known.
#include "../metrics.h"

#include "exponential.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace fastkd::FASTKD_ISA {
namespace {

enum { kStudent, kTeacher, kSides };

// Bytes between the logits computed and those fetched: the next block.
constexpr int64_t kAhead = 8192;

// Both sides, contiguous.
template <class S>
struct Classes {
  const S *student, *teacher;
  int64_t size;

  Classes block(int64_t first, int64_t width) const {
    return {student + first, teacher + first, size - first < width ? size - first : width};
  }
};

template <class A>
struct Call {
  const Rows& rows;
  const uint8_t* mask;              // one a row, or absent
  Exp<A> exp_student, exp_teacher;  // of scaled logits
  MetricsRates rates;
  A* values;
  int64_t* argmax;

  Call(const Rows& rows, const Tensor& mask, const Tensor& values, const Tensor& argmax,
       const MetricsParameters& p)
      : rows(rows),
        mask(mask.as<uint8_t>()),
        exp_student(1 / p.temperature / kLogitScale),
        exp_teacher(1 / p.teacher_temperature / kLogitScale),
        rates{p.temperature, p.teacher_temperature, exp_student.rate, exp_teacher.rate,
              exp_teacher.rate / exp_student.rate},
        values(values.as<A>()),
        argmax(argmax.as<int64_t>()) {}

  void write(int64_t row, const double (&found)[kMetrics], int64_t of_student,
             int64_t of_teacher) const {
    for (int i = 0; i < kMetrics; ++i) values[i * rows.count + row] = A(found[i]);
    argmax[row] = of_student;
    argmax[rows.count + row] = of_teacher;
  }
};

template <class A, class S>
A largest_of(const S* from, int64_t n) {
  vec_t<A> found = splat<A>(-INFINITY);
  over_vectors<A>(n, [&](int64_t i, auto lanes) {
    found = max<A>(load_lanes<A>(from + i, lanes, A(-INFINITY)), found);
  });
  return max_of<A>(found);
}

// The first of n elements that `is` says so of, a vector at a time; -1 where there is none.
template <class A, class S, class F>
int64_t first_of(const S* from, int64_t n, const F& is) {
  constexpr int W = Simd<A>::width;
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = n - i < W ? int(n - i) : W;
    const mask_t<A> found =
        is(lanes == W ? load_as<A>(from + i) : load_part<A>(from + i, lanes, A(0)));
    for (int lane = 0; lane < lanes; ++lane)
      if (found[lane]) return i + lane;
  }
  return -1;
}

// The largest element, the lowest of equal ones, and NaN before all; `sum` is NaN where there is
// one. `block` is the first with the maximum.
template <class A, class S>
int64_t argmax_of(const S* from, int64_t n, double sum, A maximum, int64_t block, int64_t width) {
  if (std::isnan(sum)) {
    const int64_t found = first_of<A>(from, n, [](vec_t<A> x) { return x != x; });
    if (found >= 0) return found;
  }
  const int64_t left = n - block;
  return block + first_of<A>(from + block, left < width ? left : width,
                             [&](vec_t<A> x) { return x == maximum; });
}

// The sums of a block, whose exponentials are left in memory. Where `excludes` is false, and a side
// excludes a class, a sum is not finite.
template <bool excludes, class A, class S>
MetricsState<double> sums_of(const Classes<S>& block, A s_max, A t_max, const Call<A>& call, A* es,
                             A* et) {
  using vec = vec_t<A>;
  const A scale = A(kLogitScale), s_shift = shift(s_max), t_shift = shift(t_max);
  const A ratio = A(call.rates.ratio);
  // Copies, which the stores below cannot change: they stay in registers.
  const Exp<A> exp_student = call.exp_student, exp_teacher = call.exp_teacher;
  const Classes<S> of = block;
  MetricsState<vec> sums{{}, {}, {}, {}, {}, {}, {}, {}};
  over_vectors<A>(of.size, [&](int64_t i, auto lanes) {
    fetch(of.student + i, Simd<A>::width, kAhead);
    fetch(of.teacher + i, Simd<A>::width, kAhead);
    const vec x = load_lanes<A>(of.student + i, lanes, A(-INFINITY)) * scale - s_shift;
    const vec y = load_lanes<A>(of.teacher + i, lanes, A(-INFINITY)) * scale - t_shift;
    const vec e = exp_student(x), p = exp_teacher(y), apart = y * ratio - x;
    store(e, es + i);
    store(p, et + i);
    sums.student += e;
    sums.teacher += p;
    if constexpr (excludes) {
      const auto no_s = x == -INFINITY, no_t = y == -INFINITY;
      sums.student_logits += no_s ? vec{} : e * x;
      sums.teacher_logits += no_t ? vec{} : p * y;
      sums.forward += term_of<ForwardKl>(e, p, apart, no_s, no_t);
      sums.reverse += term_of<ReverseKl>(e, p, apart, no_s, no_t);
    } else {
      sums.student_logits += keep<A>(e * x, lanes);
      sums.teacher_logits += keep<A>(p * y, lanes);
      sums.forward += keep<A>(p * apart, lanes);
      sums.reverse += keep<A>(e * apart, lanes);
    }
  });
  return {s_max,
          t_max,
          sum<A>(sums.student),
          sum<A>(sums.teacher),
          sum<A>(sums.student_logits),
          sum<A>(sums.teacher_logits),
          sum<A>(sums.forward),
          sum<A>(sums.reverse)};
}

// What brings an exponential from one maximum to another.
double moving(double from, double to, double rate) {
  return from == to ? 1 : from == -INFINITY ? 0 : std::exp((from - to) * rate * kLogitScale);
}

// Adds a row's block to its sums, relative to the maxima of both.
void merge(MetricsState<double>& row, MetricsState<double> block, const MetricsRates& rates) {
  const double s = block.student_max > row.student_max ? block.student_max : row.student_max;
  const double t = block.teacher_max > row.teacher_max ? block.teacher_max : row.teacher_max;
  for (MetricsState<double>* of : {&row, &block})
    of->move(s, t, moving(of->student_max, s, rates.student),
             moving(of->teacher_max, t, rates.teacher), rates.ratio);
  row.take(block);
}

// The sum of the smaller ones of p and q of a block; factors make these of exponentials.
template <class A>
double overlap_in(const A* es, const A* et, int64_t n, A by_s, A by_t) {
  vec_t<A> found = {};
  over_vectors<A>(n, [&](int64_t i, auto lanes) {
    const vec_t<A> q = load_lanes<A>(es + i, lanes, A(0)) * by_s;
    const vec_t<A> p = load_lanes<A>(et + i, lanes, A(0)) * by_t;
    found += p < q ? p : q;
  });
  return sum<A>(found);
}

// A row; `memory` has room for the exponentials of both sides, and the maxima of its blocks.
template <class A, class S>
void measure(const Call<A>& call, int64_t row, const Classes<S>& of, A* memory) {
  const int64_t width = thresholds.block, blocks = (of.size + width - 1) / width;
  A *const es = memory, *const et = es + blocks * width;
  A *const s_max = et + blocks * width, *const t_max = s_max + blocks;
  MetricsState<double> sums;
  int64_t s_block = 0, t_block = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * width;
    const Classes<S> block = of.block(first, width);
    s_max[b] = largest_of<A>(block.student, block.size);
    t_max[b] = largest_of<A>(block.teacher, block.size);
    if (s_max[b] > sums.student_max) s_block = first;
    if (t_max[b] > sums.teacher_max) t_block = first;
    auto found = sums_of<false>(block, s_max[b], t_max[b], call, es + first, et + first);
    if (!std::isfinite(found.student_logits + found.teacher_logits + found.forward + found.reverse))
      found = sums_of<true>(block, s_max[b], t_max[b], call, es + first, et + first);
    merge(sums, found, call.rates);
  }
  double overlap = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * width;
    const double by_s = moving(s_max[b], sums.student_max, call.rates.student) / sums.student;
    const double by_t = moving(t_max[b], sums.teacher_max, call.rates.teacher) / sums.teacher;
    overlap += overlap_in(es + first, et + first, of.block(first, width).size, A(by_s), A(by_t));
  }
  double values[kMetrics];
  metrics_of(sums, call.rates, values);
  values[kOverlap] = overlap_of(overlap, sums.student, sums.teacher);
  call.write(row, values,
             argmax_of(of.student, of.size, sums.student, A(sums.student_max), s_block, width),
             argmax_of(of.teacher, of.size, sums.teacher, A(sums.teacher_max), t_block, width));
}

template <class A>
void measure_rows(const Call<A>& call, int available) {
  const Rows& rows = call.rows;
  const int64_t classes = rows.classes, width = thresholds.block;
  const int64_t blocks = (classes + width - 1) / width, room = blocks * width;
  const auto over_rows = [&](const auto& f) {
    parallel_for(rows.count, threads_for(rows.count * classes, available), [&](int64_t row) {
      if (call.mask != nullptr && !call.mask[row]) return call.write(row, {}, -1, -1);
      int64_t at[kSides];
      for (int side : {kStudent, kTeacher}) at[side] = rows.offset(rows.sides[size_t(side)], row);
      f(row, at);
    });
  };
  const Side &student = rows.sides[kStudent], &teacher = rows.sides[kTeacher];
  const DType dtype = student.tensor->dtype;
  // Logits that are not contiguous, or whose dtypes differ, are brought into arithmetic precision.
  if (student.class_stride != 1 || teacher.class_stride != 1 || dtype != teacher.tensor->dtype)
    return over_rows([&](int64_t row, const int64_t (&at)[kSides]) {
      A* const memory = scratch<A>(4 * room + 2 * blocks);
      gather(*student.tensor, at[kStudent], student.class_stride, classes, memory);
      gather(*teacher.tensor, at[kTeacher], teacher.class_stride, classes, memory + room);
      measure(call, row, Classes<A>{memory, memory + room, classes}, memory + 2 * room);
    });
  with_storage(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if constexpr ((sizeof(S) == 8) == (sizeof(A) == 8))
      over_rows([&](int64_t row, const int64_t (&from)[kSides]) {
        const Classes<S> of{at<S>(*student.tensor, from[kStudent]),
                            at<S>(*teacher.tensor, from[kTeacher]), classes};
        measure(call, row, of, scratch<A>(2 * room + 2 * blocks));
      });
  });
}

void measure_any(const Tensor& student, const Tensor& teacher, const Tensor& mask,
                 const Tensor& values, const Tensor& argmax, const MetricsParameters& p,
                 int available) {
  const Rows rows({&student, &teacher}, p.dim);
  if (values.dtype == DType::f64)
    measure_rows(Call<double>(rows, mask, values, argmax, p), available);
  else
    measure_rows(Call<float>(rows, mask, values, argmax, p), available);
}

}  // namespace

extern const MetricsKernels metrics_kernels{measure_any};

}  // namespace fastkd::FASTKD_ISA
