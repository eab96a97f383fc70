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
template <class D, class A>
struct Row {
  RowState<A> state;
  A s_shift, t_shift;
  RowFactors<A> by;
  // Of the teacher's gradient: the factors of both sides' exponentials, and what log p − log q less
  // the divergence has besides the logits, scaled.
  A to_student, to_teacher, log_ratio;

  __device__ __forceinline__ Row(const Call& call, uint32_t row, const Rates<A>& rates,
                                 bool has_teacher, int64_t label) {
    const A* from = static_cast<const A*>(call.statistics) + int64_t(row) * kCount;
    state.student_max = from[kStudentMax];
    state.student = from[kStudentSum];
    state.teacher_max = from[kTeacherMax];
    state.teacher = from[kTeacherSum];
    state.hard = from[kHardSum];
    s_shift = shift(state.student_max);
    t_shift = shift(state.teacher_max);
    const bool by_row = call.reduction == Reduction::none;
    const A* counted = static_cast<const A*>(call.statistics) + int64_t(call.rows) * kCount;
    const A* upstream = static_cast<const A*>(call.grad_output);
    const auto weights = Weights<A>(call, by_row ? 1 : divisor_of(call, double(*counted)),
                                    double(upstream[by_row ? row : 0]))
                             .of_shard(call);
    const double divergence = double(from[kKl]);
    const auto ratio = [&] {
      return log(double(state.student) / double(state.teacher)) * kLogitScale;
    };
    by = RowFactors<A>(D(), state, D::mean_of(divergence, ratio()), call.inverse, rates, weights,
                       label);
    by.any = by.any && !ignores(call, row);
    to_student = weights.soft / state.student;
    to_teacher = weights.soft / state.teacher;
    log_ratio = has_teacher ? A(ratio() - divergence) : A(0);
  }

  // The teacher's gradient of one class, of its logits relative to the maxima.
  __device__ __forceinline__ A teacher(A x, A y, const Rates<A>& rates, double inverse) const {
    const A surplus = (y - x) * A(inverse) + log_ratio;
    const A g =
        D::to_teacher(rates.exp_soft(x), rates.exp_soft(y), surplus, to_student, to_teacher);
    return !by.soft || !by.any || y == A(-INFINITY) ? A(0) : g;
  }
};

// A warp takes some vectors of a row at a time.
template <class D, class A, class S, class T>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 1 : kTogether)
    soft_target_backward_rows_kernel(const __grid_constant__ Call call, uint32_t units_per_row,
                                     int64_t vectors, uint32_t units) {
  constexpr int N = kClasses<A, S, T>;
  if (is_there<A>(call)) return;
  const Rates<A> rates(call);
  const bool student = call.sides[kToStudent].data != nullptr;
  const bool teacher = call.sides[kToTeacher].data != nullptr;
  over_units(units, [&](uint32_t unit) {
    const uint32_t row = unit / units_per_row;
    const int64_t first = int64_t(unit - row * units_per_row) * kUnitVectors;
    const int64_t label = label_in_shard(call, row);
    const Row<D, A> of_row(call, row, rates, teacher, label);
    const auto start = start_of<N, kSides>(call, row);
#pragma unroll 1
    for (int v = threadIdx.x % kWarp; v < kUnitVectors && first + v < vectors; v += kWarp) {
      const int64_t i = (first + v) * N - start.phase;
      A s[N] = {}, t[N] = {};
      if (of_row.by.any) {
        load_vector<A, S>(call.sides[kStudent], start.at[kStudent], i, call.classes,
                          start.is_aligned, s);
        load_vector<A, T>(call.sides[kTeacher], start.at[kTeacher], i, call.classes,
                          start.is_aligned, t);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A x = shifted(s[k], of_row.s_shift), y = shifted(t[k], of_row.t_shift);
        s[k] = of_row.by.template of_logits<D>(x, y, rates, i + k == label);
        if (teacher) t[k] = of_row.teacher(x, y, rates, call.inverse);
      }
      if (student) store_vector<S>(s, call, kToStudent, start, i);
      if (teacher) store_vector<T>(t, call, kToTeacher, start, i);
    }
  });
}

// A lane has a row, and a warp some classes of 32 contiguous rows.
template <class D, class S, class T>
__global__ void __launch_bounds__(kThreads, kTogether)
    soft_target_backward_columns_kernel(const __grid_constant__ Call call, uint32_t units_per_tile,
                                        uint32_t units) {
  if (is_there<float>(call)) return;
  const Rates<float> rates(call);
  const bool has_teacher = call.sides[kToTeacher].data != nullptr;
  over_units(units, [&](uint32_t unit) {
    const uint32_t tile = unit / units_per_tile;
    const int64_t first = int64_t(unit - tile * units_per_tile) * kColumnClasses;
    const uint32_t row = tile * kWarp + threadIdx.x % kWarp;
    if (row >= call.rows) return;
    const int64_t label = label_in_shard(call, row);
    const Row<D, float> of_row(call, row, rates, has_teacher, label);
    int64_t at[kSides];
    locate(call, row, at);
    const auto& [student, teacher, to_student, to_teacher] = call.sides;
    const auto from_student = elements_of<S>(student, at[kStudent]);
    const auto from_teacher = elements_of<T>(teacher, at[kTeacher]);
    const auto into_student = elements_of<S>(to_student, at[kToStudent]);
    const auto into_teacher = elements_of<T>(to_teacher, at[kToTeacher]);
#pragma unroll 4
    for (int64_t k = first; k < first + kColumnClasses; ++k) {
      if (k >= call.classes) break;
      float x = 0, y = 0;
      if (of_row.by.any) {
        x = shifted(float(from_student.load(k * student.class_stride)), of_row.s_shift);
        y = shifted(float(from_teacher.load(k * teacher.class_stride)), of_row.t_shift);
      }
      if (into_student.data != nullptr)
        into_student.store(k * to_student.class_stride,
                           of_row.by.template of_logits<D>(x, y, rates, k == label));
      if (has_teacher)
        into_teacher.store(k * to_teacher.class_stride, of_row.teacher(x, y, rates, call.inverse));
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

template <class D, class A, class S, class T>
void launch_on_rows(D, A, S*, T*, const Call& call, const Stream& stream) {
  const int64_t vectors = vectors_of(call, kClasses<A, S, T>);
  const int64_t per_row = (vectors + kUnitVectors - 1) / kUnitVectors;
  launch_units(soft_target_backward_rows_kernel<D, A, S, T>, call.rows * per_row, stream, call,
               uint32_t(per_row), vectors);
}

}  // namespace

void launch_backward(const Call& call, bool are_columns, const Stream& stream) {
  with_types_of(call, [&](auto divergence, auto* one, auto* other) {
    if constexpr (std::is_same_v<decltype(one), Any*>)
      if (call.is_double) return launch_on_rows(divergence, double(), one, other, call, stream);
    if (!are_columns) return launch_on_rows(divergence, float(), one, other, call, stream);
    const int64_t tiles = (int64_t(call.rows) + kWarp - 1) / kWarp;
    const int64_t per_tile = (call.classes + kColumnClasses - 1) / kColumnClasses;
    using S = std::remove_pointer_t<decltype(one)>;
    using T = std::remove_pointer_t<decltype(other)>;
    launch_units(soft_target_backward_columns_kernel<decltype(divergence), S, T>, tiles * per_tile,
                 stream, call, uint32_t(per_tile));
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
