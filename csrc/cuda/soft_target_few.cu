// Few classes: aligned rows of up to 1,024 classes of a student and one teacher, as many as the
// chip holds at a time. A warp has a row from its first load to its gradient, so there is no loop
// over rows and no row to fetch ahead.
#include "soft_target_forms.h"
#include "soft_target_stage.h"

namespace fastkd::cuda {
namespace logits {
namespace {

// A warp for each scheduler of a multiprocessor.
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
// Classes of a lane: in short rows, and at most.
constexpr int kShort = 8, kMost = 32;
// Of such blocks there are several on a multiprocessor: up to 80 registers a thread, or 168.
constexpr int blocks_together(int classes) { return classes > kShort ? 3 : 6; }

struct Shared {
  LossShared<kWarps> losses;
};

// V vectors of N classes of one side, as they came from memory; beyond the row there are excluded
// classes.
template <class S, int V, int N>
struct Loaded {
  static constexpr int kPlanes = planes_of<S>(N);
  Vector<uint32_t, kAccess / sizeof(uint32_t)> planes[V][kPlanes];

  __device__ __forceinline__ void load_from(const Tensor& from, int64_t row, int first,
                                            int classes) {
    as_storage<S>(from.dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
      constexpr int kWidth = kAccess / sizeof(E);
      const E* const data = reinterpret_cast<const E*>(from.data) + row + first;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool exists = first + v * kWarp * N < classes;
#pragma unroll
        for (int p = 0; p < N / kWidth; ++p) {
          Vector<E, kWidth> plane;
#pragma unroll
          for (E& x : plane.values) x = narrow<E>(-INFINITY);
          if (exists) plane = load<kWidth>(data + v * kWarp * N + p * kWidth);
          memcpy(&planes[v][p], &plane, kAccess);
        }
      }
    });
  }
  __device__ __forceinline__ void widen_to(float (&to)[V * N], DType dtype) const {
    as_storage<S>(dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
      constexpr int kWidth = kAccess / sizeof(E);
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int p = 0; p < N / kWidth; ++p) {
          Vector<E, kWidth> plane;
          memcpy(&plane, &planes[v][p], kAccess);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) to[v * N + p * kWidth + k] = widen(plane.values[k]);
        }
    });
  }
};

// A lane's part in a row: V vectors of N classes, from `first` on, a warp's vectors apart.
template <class D, class S, class T, int V>
struct Row {
  static constexpr int N = kVector<S, T>;
  using Classes = float[V * N];

  const Call& call;
  const Stage of_hard;  // the exponentials at temperature 1
  const Rates<float> rates{call};
  const int classes = int(call.classes);
  const int lane = threadIdx.x % kWarp;
  const int first = lane * N;

  __device__ __forceinline__ Stage hard(int v) const {
    return of_hard.plane(v * planes_of<float>(N));
  }
  // f(vector, its first class), for those that the row has.
  template <class F>
  __device__ __forceinline__ void over_vectors(const F& f) const {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (first + v * kWarp * N < classes) f(v, first + v * kWarp * N);
  }

  // The row's state, in every lane. The logits become their exponentials.
  __device__ __forceinline__ RowState<float> sums(Classes& s, Classes& t) const {
    RowState<float> row;
#pragma unroll
    for (int j = 0; j < V * N; ++j) {
      row.student_max = fmaxf(row.student_max, s[j]);
      row.teacher_max = fmaxf(row.teacher_max, t[j]);
    }
    row.student_max = over_lanes_max<kWarp>(row.student_max);
    row.teacher_max = over_lanes_max<kWarp>(row.teacher_max);
    const float s_shift = shift(row.student_max), t_shift = shift(row.teacher_max);
    if (call.smooths()) {
      over_vectors([&](int v, int) {
#pragma unroll
        for (int k = 0; k < N; ++k) row.logits += double(s[v * N + k]);
      });
      row.logits *= kLogitScale;
    }
    if (rates.has_hard)
      over_vectors([&](int v, int) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float eh = rates.exp_hard(shifted(s[v * N + k], s_shift));
          row.hard += eh;
          hard(v).template put<float>(k, eh);
        }
      });
#pragma unroll
    for (int j = 0; j < V * N; ++j) {
      const float x = shifted(s[j], s_shift), y = shifted(t[j], t_shift);
      s[j] = rates.exp_soft(x);
      t[j] = add_class<D>(row, x, y, s[j], rates.exp_soft(y));
    }
    add_over_lanes<kWarp>(row, rates.has_hard, call.smooths());
    return row;
  }

  __device__ __forceinline__ void store(const float (&g)[N], int64_t row, int i) const {
    const Tensor& to = call.sides[kToStudent];
    as_storage<S>(to.dtype, [&](auto* storage) {
      using E = std::remove_pointer_t<decltype(storage)>;
      constexpr int kWidth = kAccess / sizeof(E);
      E* const data = reinterpret_cast<E*>(to.data) + row + i;
#pragma unroll
      for (int p = 0; p < N / kWidth; ++p) {
        Vector<E, kWidth> plane;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) plane.values[k] = narrow<E>(g[p * kWidth + k]);
        cuda::store<kWidth>(plane, data + p * kWidth);
      }
    });
  }
  __device__ __forceinline__ void write_zeros(int64_t row) const {
    const float zeros[N] = {};
    over_vectors([&](int, int i) { store(zeros, row, i); });
  }
  // Of what was kept of the classes.
  __device__ __forceinline__ void write_gradient(int64_t row, const Classes& es,
                                                 const Classes& kept, const RowFactors<float>& by,
                                                 int label) const {
    if (!by.any) return write_zeros(row);
    over_vectors([&](int v, int i) {
      float g[N] = {};
      if (by.has_hard) hard(v).template load_to<float, N>(DType::f32, g);
#pragma unroll
      for (int k = 0; k < N; ++k)
        g[k] = by.template gradient<D>(es[v * N + k], kept[v * N + k], g[k]);
      if (label >= i && label < i + N) {
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (i + k == label) g[k] -= by.label;
      }
      store(g, row, i);
    });
  }
};

template <class D, class S, class T, int V>
__global__ void __launch_bounds__(kThreads, blocks_together(V* kVector<S, T>))
    soft_target_few_kernel(const __grid_constant__ Call call, const Tickets tickets) {
  Shared& shared = shared_memory<Shared>();
  const Row<D, S, T, V> of_row{
      call, {after<char>(shared) + threadIdx.x * kAccess, int(blockDim.x) * kAccess}};
  const uint32_t row = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const bool exists = row < call.rows;
  const auto& [student, teacher, gradient, unused] = call.sides;
  // All that comes from memory is asked for before the first barrier.
  int64_t at[kToStudent + 1] = {};
  Loaded<S, V, kVector<S, T>> s_loaded;
  Loaded<T, V, kVector<S, T>> t_loaded;
  if (exists) locate(call, row, at);
  s_loaded.load_from(student, at[kStudent], of_row.first, exists ? of_row.classes : 0);
  t_loaded.load_from(teacher, at[kTeacher], of_row.first, exists ? of_row.classes : 0);
  const bool is_ignored = exists && ignores(call, row);
  const int label = exists && !is_ignored ? int(label_of(call, row)) : int(kNoLabels);
  const float label_logit = float(logit_of<S>(call, at[kStudent], label));
  const double counted = counted_rows(call, shared.losses);
  const Weights<float> weights(call, divisor_of(call, counted), 1);

  Losses losses;
  if (is_ignored) {
    if (of_row.lane == 0) write_ignored_row<float>(call, row);
    if (gradient.data != nullptr) of_row.write_zeros(at[kToStudent]);
  } else if (exists) {
    typename Row<D, S, T, V>::Classes s, t;
    s_loaded.widen_to(s, student.dtype);
    t_loaded.widen_to(t, teacher.dtype);
    const RowState<float> state = of_row.sums(s, t);
    if (gradient.data != nullptr) {
      const RowFactors<float> by(D(), state, call.inverse, of_row.rates,
                                 weights.times(grad_output_of<float>(call, row)), label);
      of_row.write_gradient(at[kToStudent], s, t, by, label);
    }
    // Here, where no exponential waits in a register.
    if (of_row.lane == 0)
      write_row(call, row, state, losses_of<D>(state, of_row.rates, call, label, label_logit),
                losses);
  }
  write_loss<float>(call, losses, counted, tickets, shared.losses);
}

template <class D, class S, class T, int V>
bool launch_vectors(const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr auto kernel = soft_target_few_kernel<D, S, T, V>;
  constexpr int N = kVector<S, T>;
  const int warps = int(std::min<int64_t>(call.rows, kWarps));
  Grid grid{(int64_t(call.rows) + warps - 1) / warps, warps * kWarp, kHeader<Shared>};
  if (call.has_hard) grid.shared_bytes += size_t(grid.threads) * V * N * sizeof(float);
  // More rows than these are better served by blocks that stay and fetch ahead.
  if (grid.blocks > std::min(resident_clusters(kernel, grid, stream), kMostBlocks)) return false;
  launch(kernel, grid, stream, call, scratch.tickets(call, stream));
  return true;
}

template <class D, class S, class T>
bool launch_typed(D, S*, T*, const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr int N = kVector<S, T>;
  if (!call.is_aligned || call.classes % N != 0 || call.classes > kMost * kWarp) return false;
  return (call.classes <= kShort * kWarp
              ? launch_vectors<D, S, T, kShort / N>
              : launch_vectors<D, S, T, kMost / N>)(call, scratch, stream);
}

}  // namespace

bool launch_few(const Call& call, const Scratch& scratch, const Stream& stream) {
  return with_types_of(call, [&](auto divergence, auto* one, auto* other) {
    return launch_typed(divergence, one, other, call, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
