// Metrics of rows of logits: a block has a row, which it reads from memory once, and for the
// overlap once more out of the caches, backwards.
#include <algorithm>
#include <cfloat>
#include <stdexcept>

#include "../metrics.h"
#include "launch.h"
#include "soft_target_vectors.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// A call whose sides are those of a loss, without gradients.
struct MetricsCall {
  Call call;
  const uint8_t* mask;  // one a row, or absent
  void* values;
  int64_t* argmax;
  double student_rate, teacher_rate;  // log2(e) / T, of scaled logits
  MetricsRates rates;
};

// The largest logit, the lowest class of equal ones, and the first NaN before all.
template <class A>
struct Largest {
  A value = A(-INFINITY);
  int64_t at = 0;

  // One that comes after those before.
  __device__ __forceinline__ void take(A x, int64_t i) {
    if (x > value || (isnan(x) && !isnan(value))) value = x, at = i;
  }
  __device__ __forceinline__ void take_any(A x, int64_t i) {
    const bool is_equal = x == value || (isnan(x) && isnan(value));
    if (is_equal)
      at = i < at ? i : at;
    else
      take(x, i);
  }
};

template <class A>
struct Shared {
  Largest<A> student[kWarps], teacher[kWarps];
  double sums[kWarps][6], overlap[kWarps][1];
};

// Of a warp, and of a block, in every thread. The block's memory is in use until the next barrier.
template <class A>
__device__ __forceinline__ void over_warp(Largest<A>& of) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    of.take_any(__shfl_xor_sync(kAllLanes, of.value, lanes),
                __shfl_xor_sync(kAllLanes, of.at, lanes));
}
template <class A>
__device__ __forceinline__ void over_block(Largest<A>& student, Largest<A>& teacher,
                                           Shared<A>& shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  over_warp(student);
  over_warp(teacher);
  if (lane == 0) shared.student[warp] = student, shared.teacher[warp] = teacher;
  __syncthreads();
  if (lane < int(blockDim.x) / kWarp)
    student = shared.student[lane], teacher = shared.teacher[lane];
  over_warp(student);
  over_warp(teacher);
}

// The arithmetic of exponentials.
template <class A>
struct Arithmetic {
  A student_rate, teacher_rate, ratio;

  __device__ explicit Arithmetic(const MetricsCall& of)
      : student_rate(A(of.student_rate)),
        teacher_rate(A(of.teacher_rate)),
        ratio(A(of.rates.ratio)) {}

  // What brings exponentials from one maximum to another.
  __device__ __forceinline__ static A moving(A from, A to, A rate) {
    return from == to             ? A(1)
           : from == A(-INFINITY) ? A(0)
                                  : exp2_of(shifted(from, to * A(kLogitScale)) * rate);
  }
  __device__ __forceinline__ void move(MetricsState<A>& row, A student_max, A teacher_max) const {
    row.move(student_max, teacher_max, moving(row.student_max, student_max, student_rate),
             moving(row.teacher_max, teacher_max, teacher_rate), ratio);
  }

  // Adds a class that either side may exclude, of scaled logits relative to the maxima.
  __device__ __forceinline__ void add(MetricsState<A>& row, A x, A y) const {
    const A es = exp2_of(x * student_rate), et = exp2_of(y * teacher_rate), apart = y * ratio - x;
    const bool no_s = x == A(-INFINITY), no_t = y == A(-INFINITY);
    row.student += es;
    row.teacher += et;
    row.student_logits += no_s ? A(0) : es * x;
    row.teacher_logits += no_t ? A(0) : et * y;
    row.forward += term_of<ForwardKl>(es, et, apart, no_s, no_t);
    row.reverse += term_of<ReverseKl>(es, et, apart, no_s, no_t);
  }
};

template <class A>
__device__ __forceinline__ void write(const MetricsCall& of, uint32_t row,
                                      const double (&values)[kMetrics], int64_t student_at,
                                      int64_t teacher_at) {
  const int64_t rows = of.call.rows;
#pragma unroll
  for (int i = 0; i < kMetrics; ++i) static_cast<A*>(of.values)[i * rows + row] = A(values[i]);
  of.argmax[row] = student_at;
  of.argmax[rows + row] = teacher_at;
}

// One row, by all threads of the block.
template <class A, class S>
__device__ __forceinline__ void measure(const MetricsCall& of, uint32_t row, int64_t vectors,
                                        Shared<A>& shared) {
  constexpr int N = kClasses<A, S, S>;
  const Call& call = of.call;
  const Arithmetic<A> arithmetic(of);
  const auto start = start_of<N>(call, row);
  const auto read = [&](int64_t i, A(&s)[N], A(&t)[N]) {
    load_vector<A, S>(call.sides[kStudent], start.at[kStudent], i, call.classes, start.is_aligned,
                      s);
    load_vector<A, S>(call.sides[kTeacher], start.at[kTeacher], i, call.classes, start.is_aligned,
                      t);
  };
  Largest<A> student, teacher;
  MetricsState<A> state;
  int64_t v = threadIdx.x;
#pragma unroll 1
  for (; v < vectors; v += blockDim.x) {
    const int64_t i = v * N - start.phase;
    A s[N], t[N];
    read(i, s, t);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      student.take(s[k], i + k);
      teacher.take(t[k], i + k);
    }
    if (student.value != state.student_max || teacher.value != state.teacher_max)
      arithmetic.move(state, student.value, teacher.value);
    const A s_shift = shift(student.value), t_shift = shift(teacher.value);
    // A partial sum of their own takes part in fewer roundings.
    MetricsState<A> these;
#pragma unroll
    for (int k = 0; k < N; ++k)
      arithmetic.add(these, shifted(s[k], s_shift), shifted(t[k], t_shift));
    state.take(these);
  }
  over_block(student, teacher, shared);
  arithmetic.move(state, student.value, teacher.value);
  double sums[6] = {state.student,        state.teacher, state.student_logits,
                    state.teacher_logits, state.forward, state.reverse};
  block_sums(sums, shared.sums);

  const A s_shift = shift(student.value), t_shift = shift(teacher.value);
  const A by_s = A(1 / sums[0]), by_t = A(1 / sums[1]);
  double overlap[1] = {};
#pragma unroll 1
  for (v -= blockDim.x; v >= 0; v -= blockDim.x) {
    A s[N], t[N], found = 0;
    read(v * N - start.phase, s, t);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A q = exp2_of(shifted(s[k], s_shift) * arithmetic.student_rate) * by_s;
      const A p = exp2_of(shifted(t[k], t_shift) * arithmetic.teacher_rate) * by_t;
      found += p < q ? p : q;
    }
    overlap[0] += double(found);
  }
  block_sums(overlap, shared.overlap);
  if (threadIdx.x > 0) return;
  double values[kMetrics];
  metrics_of(MetricsState<double>{double(student.value), double(teacher.value), sums[0], sums[1],
                                  sums[2], sums[3], sums[4], sums[5]},
             of.rates, values);
  values[kOverlap] = overlap_of(overlap[0], sums[0], sums[1]);
  write<A>(of, row, values, student.at, teacher.at);
}

// One block on a multiprocessor is enough: the bound for two makes the compiler spill.
template <class A, class S>
__global__ void __launch_bounds__(kThreads, 1)
    metrics_kernel(const __grid_constant__ MetricsCall of, int64_t vectors) {
  Shared<A>& shared = shared_memory<Shared<A>>();
  const uint32_t rows = of.call.rows;
  for (uint32_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if (of.mask == nullptr || of.mask[row]) {
      measure<A, S>(of, row, vectors, shared);
    } else if (threadIdx.x == 0) {
      const double zeros[kMetrics] = {};
      write<A>(of, row, zeros, -1, -1);
    }
    if (rows - row <= gridDim.x) break;
  }
}

template <class A, class S>
void launch_typed(const MetricsCall& of, const Stream& stream) {
  const auto kernel = metrics_kernel<A, S>;
  const int64_t vectors = vectors_of(of.call, kClasses<A, S, S>);
  const int64_t threads = (vectors + kWarp - 1) / kWarp * kWarp;
  Grid grid{1, int(std::min<int64_t>(threads, kThreads)), sizeof(Shared<A>)};
  grid.blocks = std::min(int64_t(of.call.rows), resident_clusters(kernel, grid, stream));
  launch(kernel, grid, stream, of, vectors);
}

// The rows of two tensors of one shape, and how they lie in memory.
void find_rows(Call& call, const fastkd::Tensor& student, const fastkd::Tensor& teacher, int dim) {
  const fastkd::Tensor* const sides[] = {&student, &teacher};
  call.classes = student.sizes[dim];
  call.is_double = student.dtype == DType::f64 || teacher.dtype == DType::f64;
  call.is_dense = true;
  for (int side : {kStudent, kTeacher}) {
    const fastkd::Tensor& from = *sides[side];
    call.sides[side] = {from.data, from.dtype, call.classes == 1 ? 1 : from.strides[dim]};
    call.is_dense = call.is_dense && call.sides[side].class_stride == 1;
  }
  int64_t rows = 1;
  for (int d = 0; d < student.ndim; ++d) {
    if (d == dim || student.sizes[d] == 1) continue;
    rows *= student.sizes[d];
    call.axis[call.axes++] = {uint32_t(student.sizes[d]),
                              {student.strides[d], teacher.strides[d], 0, 0}};
  }
  if (rows > UINT32_MAX) throw std::invalid_argument("too many rows of logits for a GPU");
  call.rows = uint32_t(rows);
}

}  // namespace
}  // namespace logits

void distillation_metrics(const Place& place, const Tensor& student, const Tensor& teacher,
                          const Tensor& mask, const Tensor& values, const Tensor& argmax,
                          const MetricsParameters& p) {
  using namespace logits;
  if (student.numel() == 0) return;
  const Stream stream(place);
  MetricsCall of{};
  find_rows(of.call, student, teacher, p.dim);
  of.mask = mask.as<uint8_t>();
  of.values = values.data;
  of.argmax = argmax.as<int64_t>();
  const auto rate_of = [&](double temperature) {
    const double rate = kLog2E / temperature / kLogitScale;
    // Where the largest logit alone counts, or all count the same, 0 · inf would be NaN.
    return of.call.is_double
               ? rate
               : double(float(std::min(std::max(rate, double(FLT_MIN)), double(FLT_MAX))));
  };
  of.student_rate = rate_of(p.temperature);
  of.teacher_rate = rate_of(p.teacher_temperature);
  of.rates = {p.temperature, p.teacher_temperature, of.student_rate / kLog2E,
              of.teacher_rate / kLog2E, of.teacher_rate / of.student_rate};
  if (of.call.is_double) return launch_typed<double, Any>(of, stream);
  if (student.dtype != teacher.dtype) return launch_typed<float, Any>(of, stream);
  with_storage(student.dtype, [&](auto* storage) {
    launch_typed<float, std::remove_pointer_t<decltype(storage)>>(of, stream);
  });
}

}  // namespace fastkd::cuda
