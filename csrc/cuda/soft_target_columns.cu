// Contiguous rows whose classes are apart (dim=1 of N, C, H, W): a lane has a row, and the warps of
// a block share out the classes, so nothing is transposed.
#include "soft_target_forms.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAtOnce = 4;    // classes that a thread has in flight
constexpr int kTogether = 8;  // classes that raise the maxima together

struct Shared {
  RowState<float> of_warps[kWarps][kWarp];
  LossShared<kWarps> losses;
};

// f(class), for the classes of this warp.
template <class F>
__device__ __forceinline__ void over_classes(int classes, const F& f) {
#pragma unroll kAtOnce
  for (int k = threadIdx.x / kWarp; k < classes; k += kWarps) f(k);
}

// A thread's part in a tile of 32 rows. Where `is_kept` what a class amounts to stays in shared
// memory; otherwise the logits are read again. A place there is one thread's alone.
template <class D, class S, class T>
struct Columns {
  const Call& call;
  Shared& shared;
  const bool is_kept, with_logits;
  const Rates<float> rates;
  const Weights<float> weights;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int classes = int(call.classes);
  float* const es = after<float>(shared) + lane;
  float* const kept = es + classes * kWarp;
  float* const eh = kept + classes * kWarp;

  // The state of this warp's classes, from maxima that rise on the way. load(class, s, t) reads a
  // class.
  template <class F>
  __device__ __forceinline__ void add_classes(const F& load, RowState<float>& own) const {
    for (int first = warp; first < classes; first += kTogether * kWarps) {
      float s[kTogether], t[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int k = first + j * kWarps;
        s[j] = t[j] = -INFINITY;
        if (k < classes) load(k, s[j], t[j]);
      }
      add<D>(own, s, t, 0, (classes - first + kWarps - 1) / kWarps, rates, with_logits);
    }
  }
  // The same of classes that are kept, relative to their maxima.
  template <class F>
  __device__ __forceinline__ void keep_classes(const F& load, RowState<float>& own) const {
    over_classes(classes, [&](int k) {
      float s, t;
      load(k, s, t);
      es[k * kWarp] = s;
      kept[k * kWarp] = t;
      own.student_max = fmaxf(own.student_max, s);
      own.teacher_max = fmaxf(own.teacher_max, t);
    });
    const float s_shift = shift(own.student_max), t_shift = shift(own.teacher_max);
    over_classes(classes, [&](int k) {
      const float s = es[k * kWarp];
      const float x = shifted(s, s_shift), y = shifted(kept[k * kWarp], t_shift);
      const float of_student = rates.exp_soft(x);
      es[k * kWarp] = of_student;
      kept[k * kWarp] = add_class<D>(own, x, y, of_student, rates.exp_soft(y));
      if (rates.has_hard) {
        const float of_hard = rates.exp_hard(x);
        own.hard += of_hard;
        eh[k * kWarp] = of_hard;
      }
      if (with_logits) own.logits += double(s) * kLogitScale;
    });
  }

  // The row's state from each warp's.
  __device__ __forceinline__ RowState<float> merge(const RowState<float>& own) const {
    shared.of_warps[warp][lane] = own;
    __syncthreads();
    RowState<float> whole = shared.of_warps[0][lane];
#pragma unroll 1
    for (int other = 1; other < kWarps; ++other) {
      RowState<float> part = shared.of_warps[other][lane];
      const float s_max = fmaxf(whole.student_max, part.student_max);
      const float t_max = fmaxf(whole.teacher_max, part.teacher_max);
      whole.template move<D>(s_max, t_max, rates);
      part.template move<D>(s_max, t_max, rates);
      whole.take(part);
    }
    __syncthreads();
    return whole;
  }

  template <class F>
  __device__ __forceinline__ void write_gradient(const F& load, const Elements<S>& to,
                                                 const RowState<float>& own,
                                                 const RowState<float>& whole, RowFactors<float> by,
                                                 int64_t label) const {
    const int64_t stride = call.sides[kToStudent].class_stride;
    if (is_kept) {
      by.template move<D>(own.student_max, own.teacher_max, whole, rates);
      over_classes(classes, [&](int k) {
        float g = 0;
        if (by.any)
          g = by.template of_kept<D>(es[k * kWarp], kept[k * kWarp],
                                     rates.has_hard ? eh[k * kWarp] : 0, k == label);
        to.store(k * stride, g);
      });
      return;
    }
    const float s_shift = shift(whole.student_max), t_shift = shift(whole.teacher_max);
    over_classes(classes, [&](int k) {
      float s = 0, t = 0;
      if (by.any) load(k, s, t);
      to.store(k * stride, by.template of_logits<D>(shifted(s, s_shift), shifted(t, t_shift), rates,
                                                    k == label));
    });
  }

  // One tile, whose losses are added to the total.
  __device__ __forceinline__ void run(uint32_t tile, Losses& total) const {
    const uint32_t row = tile * kWarp + lane;
    const bool exists = row < call.rows, is_ignored = exists && ignores(call, row);
    const bool counts = exists && !is_ignored;
    int64_t at[kToStudent + 1] = {};
    if (exists) locate(call, row, at);
    const int64_t label = counts ? label_of(call, row) : kNoLabels;
    const auto& [student, teacher, gradient, unused] = call.sides;
    const auto from_student = elements_of<S>(student, at[kStudent]);
    const auto from_teacher = elements_of<T>(teacher, at[kTeacher]);
    const auto load = [&, s_stride = student.class_stride, t_stride = teacher.class_stride](
                          int k, float& s, float& t) {
      s = float(from_student.load(k * s_stride));
      t = float(from_teacher.load(k * t_stride));
    };
    RowState<float> own;
    if (counts) is_kept ? keep_classes(load, own) : add_classes(load, own);
    // Before the barrier behind which the gradient may take the logits' place.
    const double logit = warp == 0 && counts ? logit_of<S>(call, at[kStudent], label) : 0;
    const RowState<float> whole = merge(own);
    if (warp == 0 && is_ignored) write_ignored_row<float>(call, row);
    if (warp == 0 && counts)
      write_row(call, row, whole, losses_of<D>(whole, rates, call, label, logit), total);
    if (!exists || gradient.data == nullptr) return;
    RowFactors<float> by(D(), whole, call.inverse, rates,
                         weights.times(grad_output_of<float>(call, row)), label);
    by.any = by.any && counts;
    write_gradient(load, elements_of<S>(gradient, at[kToStudent]), own, whole, by, label);
  }
};

template <class D, class S, class T>
__global__ void __launch_bounds__(kThreads, 3)
    soft_target_columns_kernel(const __grid_constant__ Call call, bool is_kept,
                               const Tickets tickets) {
  Shared& shared = shared_memory<Shared>();
  const double counted = counted_rows(call, shared.losses);
  const Columns<D, S, T> columns{call,
                                 shared,
                                 is_kept,
                                 call.smooths(),
                                 Rates<float>(call),
                                 Weights<float>(call, divisor_of(call, counted), 1)};
  Losses total;
  const uint32_t tiles = (call.rows + kWarp - 1) / kWarp;
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) columns.run(tile, total);
  write_loss<float>(call, over_warp(total), counted, tickets, shared.losses);
}

template <class D, class S, class T>
void launch_typed(D, S*, T*, const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr auto kernel = soft_target_columns_kernel<D, S, T>;
  Grid grid{1, kThreads, kHeader<Shared>};
  const size_t places = size_t(call.classes) * kWarp * sizeof(float) * (call.has_hard ? 3 : 2);
  const int capacity = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, stream);
  const bool is_kept = grid.shared_bytes + places <= size_t(capacity);
  if (is_kept) grid.shared_bytes += places;
  const int64_t tiles = (int64_t(call.rows) + kWarp - 1) / kWarp;
  grid.blocks = std::min({tiles, resident_clusters(kernel, grid, stream), kMostBlocks});
  launch(kernel, grid, stream, call, is_kept, scratch.tickets(call, stream));
}

}  // namespace

void launch_columns(const Call& call, const Scratch& scratch, const Stream& stream) {
  with_types_of(call, [&](auto divergence, auto* one, auto* other) {
    launch_typed(divergence, one, other, call, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
