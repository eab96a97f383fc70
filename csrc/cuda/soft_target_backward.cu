// Gradients of student and teacher for any grad_output, from the logits and the statistics of their
// rows.
#include "soft_target_forms.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTogether = 5;  // blocks on a multiprocessor

// What a warp does at a time.
constexpr int kUnitVectors = 128;   // of a row
constexpr int kColumnClasses = 16;  // of 32 rows

// f(unit), for this warp's.
template <class F>
__device__ __forceinline__ void over_units(uint32_t units, const F& f) {
  const uint32_t step = gridDim.x * kWarps;
  for (uint32_t unit = blockIdx.x * kWarps + threadIdx.x / kWarp; unit < units; unit += step) {
    f(unit);
    if (units - unit <= step) break;
  }
}

// What a row's statistics make of a gradient.
template <class A>
struct Row {
  Sums<A> sums;
  Factors<A> by;
  A log_ratio;  // what log p − log q − KL has besides the logits, scaled

  __device__ Row(const Call& call, uint32_t row, const Rates<A>& rates, bool to_teacher,
                 int64_t label)
      : sums(read(call, row)), by(factors(call, row, sums, rates, label)), log_ratio(0) {
    if (!to_teacher) return;
    const A* from = static_cast<const A*>(call.statistics) + int64_t(row) * kCount;
    log_ratio =
        A(log(double(sums.student) / double(sums.teacher)) * kLogitScale - double(from[kKl]));
  }

 private:
  __device__ static Sums<A> read(const Call& call, uint32_t row) {
    const A* from = static_cast<const A*>(call.statistics) + int64_t(row) * kCount;
    Sums<A> sums;
    sums.student_max = from[kStudentMax];
    sums.student = from[kStudentSum];
    sums.teacher_max = from[kTeacherMax];
    sums.teacher = from[kTeacherSum];
    sums.hard = from[kHardSum];
    return sums;
  }
  __device__ static Factors<A> factors(const Call& call, uint32_t row, const Sums<A>& sums,
                                       const Rates<A>& rates, int64_t label) {
    const A* from = static_cast<const A*>(call.statistics) + int64_t(call.rows) * kCount;
    const A* upstream = static_cast<const A*>(call.grad_output);
    const bool by_row = call.reduction == Reduction::none;
    const Weights<A> weights(call, divisor_of(call, double(from[kParts - 1])),
                             double(upstream[by_row ? row : 0]));
    Factors<A> by(sums, rates, weights);
    if (label == kWrongLabel) by.smoothing = A(NAN);
    by.any = by.any && !ignores(call, row);
    return by;
  }
};

// The gradient of one class of the teacher.
template <class A>
__device__ __forceinline__ A to_teacher(const Row<A>& row, A x, A y, const Rates<A>& rates,
                                        double inverse) {
  const A surplus = (y - x) * A(inverse) + row.log_ratio;
  const A g = exp2_of(y * rates.softened) * row.by.teacher * surplus * A(1 / kLogitScale);
  return !row.by.soft || !row.by.any || y == A(-INFINITY) ? A(0) : g;
}

// A warp takes some vectors of a row at a time.
template <class A, class S, class T>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 1 : kTogether)
    soft_target_backward_rows_kernel(const __grid_constant__ Call call, uint32_t units_per_row,
                                     int64_t vectors, uint32_t units) {
  constexpr bool kIsDouble = sizeof(A) == 8;
  constexpr int N = kIsDouble ? 1 : kVector<S, T>;
  if (call.in_place && *static_cast<const A*>(call.grad_output) == A(1)) return;
  const Rates<A> rates(call);
  const bool student = call.sides[kToStudent].data != nullptr;
  const bool teacher = call.sides[kToTeacher].data != nullptr;
  over_units(units, [&](uint32_t unit) {
    const uint32_t row = unit / units_per_row;
    const int64_t first = int64_t(unit - row * units_per_row) * kUnitVectors;
    const int64_t label = label_of(call, row);
    const Row<A> of_row(call, row, rates, teacher, label);
    const A s_shift = shift(of_row.sums.student_max), t_shift = shift(of_row.sums.teacher_max);
    const auto start = start_of<N, kSides>(call, row);
#pragma unroll 1
    for (int v = threadIdx.x % kWarp; v < kUnitVectors && first + v < vectors; v += kWarp) {
      const int64_t i = (first + v) * N - start.phase;
      A s[N] = {}, t[N] = {};
      if (of_row.by.any) {
        take<A, S>(call.sides[kStudent], start.at[kStudent], i, call.classes, start.is_aligned, s);
        take<A, T>(call.sides[kTeacher], start.at[kTeacher], i, call.classes, start.is_aligned, t);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A x = shifted(s[k], s_shift), y = shifted(t[k], t_shift);
        s[k] = gradient_of(of_row.by, x, y, rates, i + k == label);
        if (teacher) t[k] = to_teacher(of_row, x, y, rates, call.inverse);
      }
      if (student)
        give<S>(s, call.sides[kToStudent], start.at[kToStudent], i, call.classes, start.is_aligned);
      if (teacher)
        give<T>(t, call.sides[kToTeacher], start.at[kToTeacher], i, call.classes, start.is_aligned);
    }
  });
}

// A lane has a row, and a warp some classes of 32 rows that lie side by side.
template <class S, class T>
__global__ void __launch_bounds__(kThreads, kTogether)
    soft_target_backward_columns_kernel(const __grid_constant__ Call call, uint32_t units_per_tile,
                                        uint32_t units) {
  if (call.in_place && *static_cast<const float*>(call.grad_output) == 1) return;
  const Rates<float> rates(call);
  const bool teacher = call.sides[kToTeacher].data != nullptr;
  over_units(units, [&](uint32_t unit) {
    const uint32_t tile = unit / units_per_tile;
    const int64_t first = int64_t(unit - tile * units_per_tile) * kColumnClasses;
    const uint32_t row = tile * kWarp + threadIdx.x % kWarp;
    if (row >= call.rows) return;
    const int64_t label = label_of(call, row);
    const Row<float> of_row(call, row, rates, teacher, label);
    const float s_shift = shift(of_row.sums.student_max);
    const float t_shift = shift(of_row.sums.teacher_max);
    int64_t at[kSides];
    locate(call, row, at);
    const auto elements_of = [&](Side side, auto* storage) {
      return Elements<std::remove_pointer_t<decltype(storage)>>(call.sides[side].data,
                                                                call.sides[side].dtype, at[side]);
    };
    S* const of_student = nullptr;
    T* const of_teacher = nullptr;
    const auto from_student = elements_of(kStudent, of_student);
    const auto from_teacher = elements_of(kTeacher, of_teacher);
    const auto into_student = elements_of(kToStudent, of_student);
    const auto into_teacher = elements_of(kToTeacher, of_teacher);
#pragma unroll 4
    for (int64_t k = first; k < first + kColumnClasses; ++k) {
      if (k >= call.classes) break;
      float x = 0, y = 0;
      if (of_row.by.any) {
        x = shifted(float(from_student.load(k * call.sides[kStudent].class_stride)), s_shift);
        y = shifted(float(from_teacher.load(k * call.sides[kTeacher].class_stride)), t_shift);
      }
      if (into_student.data != nullptr)
        into_student.store(k * call.sides[kToStudent].class_stride,
                           gradient_of(of_row.by, x, y, rates, k == label));
      if (teacher)
        into_teacher.store(k * call.sides[kToTeacher].class_stride,
                           to_teacher(of_row, x, y, rates, call.inverse));
    }
  });
}

template <class... Parameters, class... Arguments>
void launch_units(void (*kernel)(Parameters...), int64_t units, const Stream& stream,
                  Arguments&&... arguments) {
  if (units > UINT32_MAX) throw std::invalid_argument("too many logits for a GPU");
  Grid grid{1, kThreads};
  grid.blocks = std::min((units + kWarps - 1) / kWarps, resident_clusters(kernel, grid, stream));
  launch(kernel, grid, stream, std::forward<Arguments>(arguments)..., uint32_t(units));
}

template <class A, class S, class T>
void launch_on_rows(const Call& call, const Stream& stream) {
  const int64_t vectors = vectors_of(call, sizeof(A) == 8 ? 1 : kVector<S, T>);
  const int64_t per_row = (vectors + kUnitVectors - 1) / kUnitVectors;
  launch_units(soft_target_backward_rows_kernel<A, S, T>, call.rows * per_row, stream, call,
               uint32_t(per_row), vectors);
}

}  // namespace

void launch_backward(const Call& call, bool are_columns, const Stream& stream) {
  if (is_double(call)) return launch_on_rows<double, Any, Any>(call, stream);
  with_storage_of(call, [&](auto* one, auto* other) {
    using S = std::remove_pointer_t<decltype(one)>;
    using T = std::remove_pointer_t<decltype(other)>;
    if (!are_columns) return launch_on_rows<float, S, T>(call, stream);
    const int64_t tiles = (int64_t(call.rows) + kWarp - 1) / kWarp;
    const int64_t per_tile = (call.classes + kColumnClasses - 1) / kColumnClasses;
    launch_units(soft_target_backward_columns_kernel<S, T>, tiles * per_tile, stream, call,
                 uint32_t(per_tile));
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
