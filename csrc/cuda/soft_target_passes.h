// Rows that are read again in each of several passes: how a thread shares in a row, what it reads
// of one, and the sums of one tensor's row.
#pragma once

#include "../softcap.h"
#include "soft_target_forms.h"
#include "soft_target_mean.h"

namespace fastkd::cuda::logits {

constexpr int kColumnThreads = 128;

// What becomes of a teacher's scaled logits in a row: exp2((t - shift) · rate) · by.
template <class A>
struct Normaliser {
  A shift, by;
};

template <class A>
struct PassesShared : BlockShared<A> {
  double sums[kBlockRowThreads / kWarp][2];
};

// N classes. Those outside of the row are excluded ones.
template <class A, int N>
__device__ __forceinline__ void read(const Tensor& from, int64_t at, int64_t i, int64_t classes,
                                     bool is_aligned, A (&to)[N]) {
  if (is_aligned) return load_vector<A, Any>(from, at, i, classes, true, to);
  const auto of_storage = [&](auto* storage) {
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
  };
  if constexpr (sizeof(A) == sizeof(double))
    if (from.dtype == DType::f64) return of_storage(static_cast<double*>(nullptr));
  with_storage(from.dtype, of_storage);
}

// Merges the states of lanes that have the student's sums.
template <class A>
struct MergeStudentLanes {
  const Rates<A>& rates;
  bool with_logits;

  template <int kLanes>
  __device__ __forceinline__ void over(RowState<A>& row) const {
    move(row, over_lanes_max<kLanes>(row.student_max));
    over_lanes_sum<kLanes>(row.student);
    if (rates.has_hard) over_lanes_sum<kLanes>(row.hard);
    if (with_logits) over_lanes_sum<kLanes>(row.logits);
  }
  __device__ __forceinline__ void move(RowState<A>& row, A to) const {
    row.student *= rates.soft(row.student_max, to);
    if (rates.has_hard) row.hard *= rates.hard(row.student_max, to);
    row.student_max = to;
  }
};

// Leaves no class out of a sum.
struct AllClasses {
  __device__ __forceinline__ unsigned operator()(int64_t) const { return 0; }
};

// A thread's part in a row, which is a block's, or in columns a thread's.
template <class A, bool kIsColumns>
struct ClassPasses {
  static constexpr int N = kClasses<A, Any, Any>;

  const Call& call;
  PassesShared<A>& shared;
  const int64_t vectors;
  const bool with_logits;
  const bool leads = kIsColumns || threadIdx.x == 0;

  __device__ __forceinline__ ClassPasses(const Call& call, PassesShared<A>& shared, int64_t vectors)
      : call(call), shared(shared), vectors(vectors), with_logits(call.smooths()) {}

  // f(first class), for the vectors of this thread.
  template <class F>
  __device__ __forceinline__ void over_vectors(int phase, const F& f) const {
    const int64_t step = kIsColumns ? 1 : int(blockDim.x);
#pragma unroll 1
    for (int64_t v = kIsColumns ? 0 : threadIdx.x; v < vectors; v += step) f(v * N - phase);
  }

  // What reads N classes of a row, from its class i on.
  __device__ __forceinline__ auto reader(const Tensor& from, int64_t at, int phase) const {
    const bool by_vectors = is_aligned(from, at, phase);
    return [=, &from](int64_t i, A(&to)[N]) { read(from, at, i, call.classes, by_vectors, to); };
  }

  // Makes of gradients those of what the logits were before they were capped, if they were. Behind
  // this they may take the place of the logits, which are read once more. A call with a softcap is
  // none in columns, whose kernels have no registers for it.
  __device__ __forceinline__ void uncap(double cap, const Tensor& from, int64_t at, int phase,
                                        int64_t i, A (&gradient)[N]) const {
    if (kIsColumns || cap == 0) return;
    A z[N];
    reader(from, at, phase)(i, z);
    const Softcap<A> softcap(cap);
#pragma unroll
    for (int k = 0; k < N; ++k) gradient[k] *= softcap.slope(z[k]);
  }

  // Maximum and sums of one tensor's row, in every thread that has a part in it. `left_out(i)` has
  // a bit for each of the N classes from i on that does not belong to the sums.
  template <bool kIsStudent, class Reader, class Merge, class LeftOut = AllClasses>
  __device__ __forceinline__ RowState<A> sums_of(const Reader& reader, int phase,
                                                 const Rates<A>& rates, const Merge& lanes,
                                                 LeftOut&& left_out = LeftOut()) const {
    RowState<A> row;
    over_vectors(phase, [&](int64_t i) {
      A x[N];
      reader(i, x);
      const unsigned out = left_out(i);
#pragma unroll
      for (int k = 0; k < N; ++k) x[k] = out >> k & 1 ? A(-INFINITY) : x[k];
      A maximum = row.student_max;
#pragma unroll
      for (int k = 0; k < N; ++k) maximum = x[k] > maximum ? x[k] : maximum;
      if (maximum > row.student_max) lanes.move(row, maximum);
      // Partial sums of their own take part in fewer roundings.
      A sum = 0, hard = 0;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const A below = shifted(x[k], shift(maximum));
        sum += rates.exp_soft(below);
        if (kIsStudent && rates.has_hard) hard += rates.exp_hard(below);
        if (kIsStudent && with_logits && i + k >= 0 && i + k < call.classes && !(out >> k & 1))
          row.logits += double(x[k] * A(kLogitScale));
      }
      row.student += sum;
      row.hard += hard;
    });
    if constexpr (!kIsColumns) merge_over_block(row, shared.of_warps, lanes);
    return row;
  }
};

// Of the passes over several teachers.
template <class A, bool kIsColumns>
struct RowPasses : ClassPasses<A, kIsColumns> {
  using Base = ClassPasses<A, kIsColumns>;
  using Base::call, Base::leads, Base::N, Base::shared;

  const MeanCall& of;
  Normaliser<A>* const normalisers = after<Normaliser<A>>(this->shared);

  __device__ __forceinline__ RowPasses(const MeanCall& of, PassesShared<A>& shared, int64_t vectors)
      : Base(of.call, shared, vectors), of(of) {}

  __device__ __forceinline__ Normaliser<A>& normaliser(int m) const {
    return normalisers[kIsColumns ? m * int(blockDim.x) + int(threadIdx.x) : m];
  }

  // The sums of every teacher's row become its normaliser, which all threads see behind a barrier.
  __device__ __forceinline__ void find_normalisers(uint32_t row, int phase,
                                                   const MeanRates<A>& rates) const {
#pragma unroll 1
    for (int m = 0; m < of.count; ++m) {
      const RowState<A> teacher = this->template sums_of<false>(
          this->reader(of.teachers[m].tensor, start_of_teacher(of, row, m), phase), phase, rates,
          MergeTeacherLanes<A>{rates});
      if (leads)
        normaliser(m) = {shift(teacher.student_max), A(of.teachers[m].weight) / teacher.student};
    }
  }

  // p of N classes.
  __device__ __forceinline__ void target(uint32_t row, int phase, int64_t i,
                                         const MeanRates<A>& rates, A (&p)[N]) const {
#pragma unroll
    for (A& x : p) x = A(-0.0);
#pragma unroll 1
    for (int m = 0; m < of.count; ++m) {
      const Tensor& teacher = of.teachers[m].tensor;
      const int64_t start = start_of_teacher(of, row, m);
      const Normaliser<A> by = normaliser(m);
      A t[N];
      read(teacher, start, i, call.classes, is_aligned(teacher, start, phase), t);
#pragma unroll
      for (int k = 0; k < N; ++k) p[k] += rates.of_teacher(shifted(t[k], by.shift)) * by.by;
    }
  }
};

// f(row), of this block's rows, or in columns of this thread's.
template <bool kIsColumns, class F>
__device__ __forceinline__ void over_rows(const Call& call, const F& f) {
  const uint32_t threads = blockDim.x;
  const uint32_t first = kIsColumns ? blockIdx.x * threads + threadIdx.x : blockIdx.x;
  const uint32_t step = kIsColumns ? gridDim.x * threads : gridDim.x;
  for (uint32_t row = first; row < call.rows; row += step) {
    f(row);
    if (call.rows - row <= step) break;
  }
}

// Launches kernel(of, vectors, tickets), whose rows are those of `call`, with so many bytes of
// shared memory for each row that a block has at a time.
template <class A, bool kIsColumns, class Of>
void launch_over_rows(void (*kernel)(Of, int64_t, Tickets), const Of& of, const Call& call,
                      size_t bytes, const Scratch& scratch, const Stream& stream) {
  constexpr int N = kClasses<A, Any, Any>;
  const int64_t vectors = kIsColumns ? (call.classes + N - 1) / N : vectors_of(call, N);
  const int threads =
      kIsColumns ? kColumnThreads
                 : int(std::min<int64_t>((vectors + kWarp - 1) / kWarp * kWarp, kBlockRowThreads));
  const int64_t at_once = kIsColumns ? threads : 1;
  Grid grid{1, threads, kHeader<PassesShared<A>> + size_t(at_once) * bytes};
  grid.blocks = std::min({(int64_t(call.rows) + at_once - 1) / at_once,
                          resident_clusters(kernel, grid, stream), kMostBlocks});
  launch(kernel, grid, stream, of, vectors, scratch.tickets(call, stream));
}

}  // namespace fastkd::cuda::logits
