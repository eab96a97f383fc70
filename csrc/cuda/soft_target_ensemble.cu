// Soft targets from several teachers: a call as rows and axes, and its form for rows of any length
// and strides, in two passes: the normalisers of all tensors, and then the loss and the gradient.
#include <cfloat>
#include <stdexcept>

#include "soft_target_ensemble.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kPassThreads = 256;
constexpr int kPassWarps = kPassThreads / kWarp;
constexpr int kColumnThreads = 128;
// Beyond so many classes a thread by itself would take too long.
constexpr int64_t kMostColumnClasses = 4096;

template <class A>
struct PassesShared {
  Part<A> of_warps[kPassWarps];
  double warps[kPassWarps];
  bool is_last;
};

// What becomes of a teacher's scaled logits in a row: exp2((t - shift) · rate) · by.
template <class A>
struct Normaliser {
  A shift, by;
};

// f(null pointer of the storage type), once for all elements that it accesses.
template <class A, class F>
__device__ __forceinline__ void with_any_storage(DType dtype, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    if (dtype == DType::f64) return f(static_cast<double*>(nullptr));
  }
  with_storage(dtype, f);
}

// N classes. Those outside of the row are excluded ones.
template <class A, int N>
__device__ __forceinline__ void read(const Tensor& from, int64_t at, int64_t i, int64_t classes,
                                     bool is_aligned, A (&to)[N]) {
  if (is_aligned) return take<A, Any>(from, at, i, classes, true, to);
  with_any_storage<A>(from.dtype, [&](auto* storage) {
    using E = std::remove_pointer_t<decltype(storage)>;
    const E* const data = reinterpret_cast<const E*>(from.data) + at;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      to[k] = A(-INFINITY);
      if (i + k < 0 || i + k >= classes) continue;
      const E x = data[(i + k) * from.class_stride];
      if constexpr (std::is_same_v<E, double>)
        to[k] = A(x);
      else
        to[k] = A(widen(x));
    }
  });
}

// A row is a block's, or where rows lie side by side a thread's.
template <class A, bool kIsColumns>
__global__ void __launch_bounds__(kIsColumns ? kColumnThreads : kPassThreads, kIsColumns ? 4 : 2)
    soft_target_ensemble_passes_kernel(const __grid_constant__ Ensemble ensemble, int64_t vectors,
                                       const Tickets tickets) {
  constexpr int N = sizeof(A) == sizeof(double) ? 1 : kVector<Any, Any>;
  PassesShared<A>& shared = shared_memory<PassesShared<A>>();
  const Call& call = ensemble.call;
  if (call.in_place && *static_cast<const A*>(call.grad_output) == A(1)) return;
  const int threads = int(blockDim.x), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  auto* const normalisers =
      reinterpret_cast<Normaliser<A>*>(reinterpret_cast<char*>(&shared) + kHeader<PassesShared<A>>);
  const auto normaliser = [&](int m) -> Normaliser<A>& {
    return normalisers[kIsColumns ? m * threads + int(threadIdx.x) : m];
  };
  const Rates<A> rates(call);
  const A of_logarithm = A(ensemble.of_logarithm), of_logit = A(ensemble.of_logit);
  const bool smooths = call.smoothing > 0 && call.labels != nullptr;
  const bool writes = call.sides[kToStudent].data != nullptr;
  const double kept = kept_rows(call, shared.warps);
  const Weights<A> weights(call, divisor_of(call, kept), 1);
  Losses total{0, 0};

  // f(first class), for the vectors of this thread.
  const auto over_vectors = [&](int phase, const auto& f) {
    const int64_t step = kIsColumns ? 1 : threads;
#pragma unroll 1
    for (int64_t v = kIsColumns ? 0 : threadIdx.x; v < vectors; v += step) f(v * N - phase);
  };
  // Every thread's part of the block, in all of them.
  const auto over_team = [&](Part<A>& part, auto is_student) {
    if constexpr (!kIsColumns) {
      constexpr bool kIsStudent = decltype(is_student)::value;
      merge_over_lanes<kWarp, kIsStudent>(part, rates, of_logit, smooths);
      if (lane == 0) shared.of_warps[warp] = part;
      __syncthreads();
      part = lane < threads / kWarp ? shared.of_warps[lane] : Part<A>();
      merge_over_lanes<kWarp, kIsStudent>(part, rates, of_logit, smooths);
      __syncthreads();
    }
  };
  // Maximum and sums of one tensor's row.
  const auto sums_of = [&](const Tensor& from, int64_t at, int phase, auto is_student) {
    constexpr bool kIsStudent = decltype(is_student)::value;
    const bool by_vectors = is_aligned(from, at, phase);
    Part<A> part;
    over_vectors(phase, [&](int64_t i) {
      A x[N];
      read(from, at, i, call.classes, by_vectors, x);
      A maximum = part.maximum;
#pragma unroll
      for (int k = 0; k < N; ++k) maximum = x[k] > maximum ? x[k] : maximum;
      if (maximum > part.maximum) part.template move<kIsStudent>(maximum, rates, of_logit);
      // By themselves first: a sum of few rounds less.
      A sum = 0, hard = 0;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A below = shifted(x[k], shift(maximum));
        sum += exp2_of(below * rates.softened);
        if (kIsStudent && rates.third) hard += exp2_of(below * rates.sharp);
        if (kIsStudent && smooths && i + k >= 0 && i + k < call.classes)
          part.logits += double(x[k] * A(kLogitScale));
      }
      part.sum += sum;
      part.hard += hard;
    });
    over_team(part, is_student);
    return part;
  };

  const auto one_row = [&](uint32_t row) {
    int64_t at[kToStudent + 1];
    locate(call, row, at);
    const int phase = kIsColumns ? 0 : phase_of<N>(call, at[kStudent]);
    const bool gives_vectors = writes && is_aligned(call.sides[kToStudent], at[kToStudent], phase);
    const auto give_vector = [&](const A(&g)[N], int64_t i) {
      give<Any>(g, call.sides[kToStudent], at[kToStudent], i, call.classes, gives_vectors);
    };
    const bool leads = kIsColumns || threadIdx.x == 0;
    if (ignores(call, row)) {
      if (leads) write_losses<A>(call, row, Losses{0, 0});
      const A zeros[N] = {};
      if (writes) over_vectors(phase, [&](int64_t i) { give_vector(zeros, i); });
      return;
    }
    const int64_t label = label_of(call, row);
#pragma unroll 1
    for (int m = 0; m < ensemble.count; ++m) {
      const int64_t start = start_of_teacher(ensemble, row, m);
      const Part<A> part = sums_of(ensemble.teachers[m].tensor, start, phase, std::false_type());
      if (leads) normaliser(m) = {shift(part.maximum), A(ensemble.teachers[m].weight) / part.sum};
    }
    // The student's sums are behind a barrier that those writes are before.
    Part<A> part = sums_of(call.sides[kStudent], at[kStudent], phase, std::true_type());
    const A s_shift = shift(part.maximum);
    Factors<A> by(as_sums(part, A(1)), rates, weights_of(call, row, weights));
    if (label == kWrongLabel) by.smoothing = A(NAN);
    const bool by_vectors = is_aligned(call.sides[kStudent], at[kStudent], phase);
    double mass = 0, difference = 0;
    over_vectors(phase, [&](int64_t i) {
      A p[N];
#pragma unroll
      for (A& x : p) x = A(-0.0);
#pragma unroll 1
      for (int m = 0; m < ensemble.count; ++m) {
        const Tensor& teacher = ensemble.teachers[m].tensor;
        const int64_t start = start_of_teacher(ensemble, row, m);
        const Normaliser<A> of = normaliser(m);
        A t[N];
        read(teacher, start, i, call.classes, is_aligned(teacher, start, phase), t);
#pragma unroll
        for (int k = 0; k < N; ++k)
          p[k] += signed_exp2(shifted(t[k], of.shift), rates.softened) * of.by;
      }
      A s[N], mass_here = 0, difference_here = 0;
      read(call.sides[kStudent], at[kStudent], i, call.classes, by_vectors, s);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A x = shifted(s[k], s_shift);
        mass_here += p[k];
        difference_here += difference_of(p[k], x, of_logarithm, of_logit);
        const A eh = rates.third ? exp2_of(x * rates.sharp) : A(0);
        s[k] = gradient_of(by, exp2_of(x * rates.softened), p[k], eh, rates.third, i + k == label);
      }
      mass += double(mass_here);
      difference += double(difference_here);
      if (writes) give_vector(s, i);
    });
    if constexpr (!kIsColumns) {
      mass = block_sum(mass, shared.warps);
      __syncthreads();
      difference = block_sum(difference, shared.warps);
      __syncthreads();
    }
    if (!leads) return;
    part.difference = A(difference);
    const double logit = label < 0 ? 0 : logit_of<Any>(call.sides[kStudent], at[kStudent], label);
    const Losses losses = losses_of(as_sums(part, A(mass)), rates, call, label, logit);
    total.kl += losses.kl;
    total.ce += losses.ce;
    write_losses<A>(call, row, losses);
  };

  const uint32_t first = kIsColumns ? blockIdx.x * threads + threadIdx.x : blockIdx.x;
  const uint32_t step = kIsColumns ? gridDim.x * threads : gridDim.x;
  for (uint32_t row = first; row < call.rows; row += step) {
    one_row(row);
    if (call.rows - row <= step) break;
  }
  write_loss<A>(call, total, kept, tickets, shared.warps, shared.is_last);
}

template <class A, bool kIsColumns>
void launch_passes(const Ensemble& ensemble, const Scratch& scratch, const Stream& stream) {
  constexpr auto kernel = soft_target_ensemble_passes_kernel<A, kIsColumns>;
  constexpr int N = sizeof(A) == sizeof(double) ? 1 : kVector<Any, Any>;
  const Call& call = ensemble.call;
  const int64_t vectors = kIsColumns ? (call.classes + N - 1) / N : vectors_of(call, N);
  const int threads =
      kIsColumns ? kColumnThreads
                 : int(std::min<int64_t>((vectors + kWarp - 1) / kWarp * kWarp, kPassThreads));
  const int64_t at_once = kIsColumns ? threads : 1;
  Grid grid{
      1, threads,
      kHeader<PassesShared<A>> + size_t(ensemble.count) * size_t(at_once) * sizeof(Normaliser<A>)};
  grid.blocks = std::min({(int64_t(call.rows) + at_once - 1) / at_once,
                          resident_clusters(kernel, grid, stream), kMostBlocks});
  launch(kernel, grid, stream, ensemble, vectors, scratch.tickets(stream));
}

// A call, and whether its rows lie side by side rather than their classes.
struct Plan {
  Ensemble ensemble{};
  bool are_columns = false, is_double = false;

  Plan(const fastkd::Tensor& student, const Tensors& teachers, const std::vector<double>& weights,
       const int64_t* labels, const fastkd::Tensor& gradient, const SoftTargetParameters& p) {
    if (teachers.size() > size_t(kMostTeachers) || teachers.size() != weights.size())
      throw std::invalid_argument("too many teachers, or not as many weights");
    Call& call = ensemble.call;
    call.classes = student.sizes[p.dim];
    call.share = 1 / double(call.classes);
    call.labels = labels;
    call.ignore_index = p.ignore_index;
    call.reduction = p.reduction;
    call.temperature = p.temperature;
    call.soft_weight = p.soft_weight;
    call.hard_weight = p.hard_weight;
    call.smoothing = labels == nullptr ? 0 : p.label_smoothing;
    call.binary = float(std::min(std::max(kBinary / p.temperature / kLogitScale, double(FLT_MIN)),
                                 double(FLT_MAX)));
    const auto side = [&](const fastkd::Tensor& tensor) {
      return Tensor{tensor.data, tensor.dtype, call.classes == 1 ? 1 : tensor.strides[p.dim]};
    };
    call.sides[kStudent] = side(student);
    if (gradient) call.sides[kToStudent] = side(gradient);
    is_double = student.dtype == DType::f64;
    ensemble.count = int(teachers.size());
    for (int m = 0; m < ensemble.count; ++m) {
      ensemble.teachers[m] = {side(teachers[m]), weights[m]};
      is_double = is_double || teachers[m].dtype == DType::f64;
    }
    find_axes(student, teachers, gradient, p.dim);
    find_layout();
    find_scale();
  }

 private:
  void find_axes(const fastkd::Tensor& student, const Tensors& teachers,
                 const fastkd::Tensor& gradient, int dim) {
    Call& call = ensemble.call;
    int64_t rows = 1;
    for (int d = 0; d < student.ndim; ++d) {
      if (d == dim || student.sizes[d] == 1) continue;
      rows *= student.sizes[d];
      if (rows > UINT32_MAX) throw std::invalid_argument("too many rows of logits for a GPU");
      if (rows == 0) break;
      Axis axis{uint32_t(student.sizes[d]), {}};
      axis.stride[kStudent] = student.strides[d];
      if (gradient) axis.stride[kToStudent] = gradient.strides[d];
      bool merges = call.axes > 0;
      const int last = call.axes - 1;
      for (int side = 0; merges && side < kSides; ++side)
        merges = call.axis[last].stride[side] == axis.stride[side] * axis.size;
      for (int m = 0; merges && m < ensemble.count; ++m)
        merges = ensemble.row_stride[last][m] == teachers[m].strides[d] * student.sizes[d];
      const int a = merges ? last : call.axes++;
      if (merges) axis.size *= call.axis[a].size;
      call.axis[a] = axis;
      for (int m = 0; m < ensemble.count; ++m) ensemble.row_stride[a][m] = teachers[m].strides[d];
    }
    call.rows = uint32_t(rows);
  }

  void find_layout() {
    Call& call = ensemble.call;
    const Tensor& student = call.sides[kStudent];
    constexpr int N = kVector<Any, Any>;
    const int64_t bytes = N * size_of(student.dtype);
    call.is_dense = student.class_stride == 1 && !is_double;
    call.is_aligned = call.is_dense && reinterpret_cast<uintptr_t>(student.data) % bytes == 0;
    for (int a = 0; a < call.axes; ++a)
      call.is_aligned = call.is_aligned && call.axis[a].stride[kStudent] % N == 0;
    if (call.axes == 0 || call.classes > kMostColumnClasses) return;
    const auto& innermost = call.axis[call.axes - 1];
    int along_classes = student.class_stride == 1, along_rows = innermost.stride[kStudent] == 1;
    for (int m = 0; m < ensemble.count; ++m) {
      along_classes += ensemble.teachers[m].tensor.class_stride == 1;
      along_rows += ensemble.row_stride[call.axes - 1][m] == 1;
    }
    are_columns = along_rows > along_classes;
  }

  void find_scale() {
    Call& call = ensemble.call;
    const double rate = is_double ? kBinary / call.temperature : double(call.binary) * kLogitScale;
    const int exponent = std::max(std::ilogb(rate), 0);
    ensemble.of_logarithm = std::ldexp(kLogitScale, -exponent);
    ensemble.of_logit = std::ldexp(rate, -exponent);
    call.inverse = std::ldexp(1 / kBinary, exponent);
  }
};

void launch_passes(const Plan& plan, const Scratch& scratch, const Stream& stream) {
  if (plan.is_double)
    return plan.are_columns ? launch_passes<double, true>(plan.ensemble, scratch, stream)
                            : launch_passes<double, false>(plan.ensemble, scratch, stream);
  return plan.are_columns ? launch_passes<float, true>(plan.ensemble, scratch, stream)
                          : launch_passes<float, false>(plan.ensemble, scratch, stream);
}

}  // namespace
}  // namespace logits

void soft_target_ensemble(const Tensor& student, const Tensors& teachers,
                          const std::vector<double>& weights, const int64_t* labels,
                          const Tensor& loss, void* parts, const Tensor& gradient,
                          const Tensor& grad_output, bool in_place, void* scratch,
                          const SoftTargetParameters& p, const Place& place) {
  using namespace logits;
  const Stream stream(place);
  Plan plan(student, teachers, weights, labels, gradient, p);
  Call& call = plan.ensemble.call;
  call.loss = loss.data;
  call.parts = parts;
  call.grad_output = grad_output.data;
  call.in_place = in_place && p.reduction != Reduction::none;
  if (call.rows == 0) {
    const DType dtype = plan.is_double ? DType::f64 : DType::f32;
    clear(call.loss, loss.numel(), dtype, stream);
    clear(parts, kParts, dtype, stream);
    return;
  }
  const Scratch own = prepare(call, scratch, stream);
  if (plan.are_columns || plan.is_double || !launch_ensemble_rows(plan.ensemble, own, stream))
    launch_passes(plan, own, stream);
}

}  // namespace fastkd::cuda
