// Rows that lie side by side while their classes are apart (dim=1 of N, C, H, W): a lane has a row,
// and the warps of a block share out the classes, so nothing is transposed.
#include "soft_target_forms.h"

namespace fastkd::cuda {
namespace logits {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAtOnce = 4;    // classes that a thread has in flight
constexpr int kTogether = 8;  // classes that raise the maxima together

struct Shared {
  Sums<float> of_warps[kWarps][kWarp];
  double warps[kWarps];
  bool is_last;
};

// f(class), for the classes of this warp.
template <class F>
__device__ __forceinline__ void over_classes(int classes, const F& f) {
#pragma unroll kAtOnce
  for (int k = threadIdx.x / kWarp; k < classes; k += kWarps) f(k);
}

// Where `is_kept` the classes' exponentials stay in shared memory; otherwise the logits are read
// again. A place there is one thread's alone.
template <class S, class T>
__global__ void __launch_bounds__(kThreads, 3)
    soft_target_columns_kernel(const __grid_constant__ Call call, bool is_kept,
                               const Tickets tickets) {
  Shared& shared = shared_memory<Shared>();
  const Rates<float> rates(call);
  const bool smooths = call.smoothing > 0 && call.labels != nullptr;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int classes = int(call.classes);
  const bool writes = call.sides[kToStudent].data != nullptr;
  float* const es =
      reinterpret_cast<float*>(reinterpret_cast<char*>(&shared) + kHeader<Shared>) + lane;
  float* const et = es + classes * kWarp;
  float* const eh = et + classes * kWarp;
  const double kept = kept_rows(call, shared.warps);
  const Weights<float> weights(call, divisor_of(call, kept), 1);
  Losses total{0, 0};
  const uint32_t tiles = (call.rows + kWarp - 1) / kWarp;
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const uint32_t row = tile * kWarp + lane;
    const bool exists = row < call.rows, is_ignored = exists && ignores(call, row);
    const bool counts = exists && !is_ignored;
    int64_t at[kToStudent + 1] = {};
    if (exists) locate(call, row, at);
    const int64_t label = counts ? label_of(call, row) : kNoLabels;
    const Elements<S> student(call.sides[kStudent].data, call.sides[kStudent].dtype, at[kStudent]);
    const Elements<T> teacher(call.sides[kTeacher].data, call.sides[kTeacher].dtype, at[kTeacher]);
    const Elements<S> gradient(call.sides[kToStudent].data, call.sides[kStudent].dtype,
                               at[kToStudent]);
    const auto take = [&](int k, float& s, float& t) {
      s = float(student.load(k * call.sides[kStudent].class_stride));
      t = float(teacher.load(k * call.sides[kTeacher].class_stride));
    };
    Sums<float> own;
    if (counts && !is_kept)
      for (int first = warp; first < classes; first += kTogether * kWarps) {
        float s[kTogether], t[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int k = first + j * kWarps;
          s[j] = t[j] = -INFINITY;
          if (k < classes) take(k, s[j], t[j]);
        }
        add(own, s, t, 0, (classes - first + kWarps - 1) / kWarps, rates, smooths);
      }
    if (counts && is_kept) {
      over_classes(classes, [&](int k) {
        float s, t;
        take(k, s, t);
        es[k * kWarp] = s;
        et[k * kWarp] = t;
        own.student_max = fmaxf(own.student_max, s);
        own.teacher_max = fmaxf(own.teacher_max, t);
      });
      const float s_shift = shift(own.student_max), t_shift = shift(own.teacher_max);
      over_classes(classes, [&](int k) {
        const float s = es[k * kWarp];
        const float x = shifted(s, s_shift), y = shifted(et[k * kWarp], t_shift);
        const float of_student = exp2_of(x * rates.softened);
        const float of_teacher = exp2_of(y * rates.softened);
        own.student += of_student;
        own.teacher += of_teacher;
        if (y != -INFINITY) own.difference += of_teacher * (y - x);
        es[k * kWarp] = of_student;
        et[k * kWarp] = of_teacher;
        if (rates.third) {
          const float sharp = exp2_of(x * rates.sharp);
          own.hard += sharp;
          eh[k * kWarp] = sharp;
        }
        if (smooths) own.logits += double(s) * kLogitScale;
      });
    }
    const float student_max = own.student_max, teacher_max = own.teacher_max;
    shared.of_warps[warp][lane] = own;
    __syncthreads();
    Sums<float> whole = shared.of_warps[0][lane];
#pragma unroll 1
    for (int other = 1; other < kWarps; ++other) {
      Sums<float> part = shared.of_warps[other][lane];
      const float s_max = fmaxf(whole.student_max, part.student_max);
      const float t_max = fmaxf(whole.teacher_max, part.teacher_max);
      whole.move(s_max, t_max, rates);
      part.move(s_max, t_max, rates);
      whole.take(part);
    }
    __syncthreads();
    if (warp == 0 && is_ignored) write_row(call, row, Sums<float>{0, 0}, Losses{0, 0});
    if (warp == 0 && counts) {
      const double logit = label < 0 ? 0 : logit_of<S>(call.sides[kStudent], at[kStudent], label);
      const Losses losses = losses_of(whole, rates, call, label, logit);
      total.kl += losses.kl;
      total.ce += losses.ce;
      write_row(call, row, whole, losses);
    }
    if (!exists || !writes) continue;
    Factors<float> by(whole, rates, weights);
    if (label == kWrongLabel) by.smoothing = NAN;
    by.any = by.any && counts;
    const int64_t stride = call.sides[kToStudent].class_stride;
    if (is_kept) {
      by.move(student_max, teacher_max, whole, rates);
      over_classes(classes, [&](int k) {
        float g = 0;
        if (by.any) {
          g = es[k * kWarp] * by.student - by.smoothing;
          if (by.soft) g -= et[k * kWarp] * by.teacher;
          if (rates.third) g += eh[k * kWarp] * by.hard;
          if (k == label) g -= by.label;
        }
        gradient.store(k * stride, g);
      });
    } else {
      const float s_shift = shift(whole.student_max), t_shift = shift(whole.teacher_max);
      over_classes(classes, [&](int k) {
        float g = 0;
        if (by.any) {
          float s, t;
          take(k, s, t);
          g = gradient_of(by, shifted(s, s_shift), shifted(t, t_shift), rates, k == label);
        }
        gradient.store(k * stride, g);
      });
    }
  }
  write_loss<float>(call, total, kept, tickets, shared.warps, shared.is_last);
}

template <class S, class T>
void launch_typed(const Call& call, const Scratch& scratch, const Stream& stream) {
  constexpr auto kernel = soft_target_columns_kernel<S, T>;
  const bool has_third = call.labels != nullptr && call.temperature != 1;
  Grid grid{1, kThreads, kHeader<Shared>};
  const size_t places = size_t(call.classes) * kWarp * sizeof(float) * (has_third ? 3 : 2);
  const size_t room = size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, stream));
  const bool is_kept = grid.shared_bytes + places <= room;
  if (is_kept) grid.shared_bytes += places;
  const int64_t tiles = (int64_t(call.rows) + kWarp - 1) / kWarp;
  grid.blocks = std::min({tiles, resident_clusters(kernel, grid, stream), kMostBlocks});
  launch(kernel, grid, stream, call, is_kept, scratch.tickets(stream));
}

}  // namespace

void launch_columns(const Call& call, const Scratch& scratch, const Stream& stream) {
  with_storage_of(call, [&](auto* one, auto* other) {
    using S = std::remove_pointer_t<decltype(one)>;
    using T = std::remove_pointer_t<decltype(other)>;
    launch_typed<S, T>(call, scratch, stream);
  });
}

}  // namespace logits
}  // namespace fastkd::cuda
