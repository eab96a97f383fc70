// Hints: difference, square, sum and gradient in one pass over both features.
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace fastkd::FASTKD_ISA {
namespace {

// The elements of one sample as runs along the student's densest dimension. `outer` counts the
// runs, each of `length` elements with a stride per tensor.
struct Runs {
  int64_t batch, outer = 1, length = 1;
  int ndim = 0;
  int64_t sizes[kMaxDims], strides[3][kMaxDims];
  int64_t run_stride[3] = {1, 1, 1}, batch_stride[3];

  Runs(const Tensor& student, const Tensor& teacher, const Tensor& gradient) {
    const Tensor* tensors[3] = {&student, &teacher, &gradient};
    batch = student.sizes[0];
    int order[kMaxDims], dims = 0;
    for (int d = 1; d < student.ndim; ++d) {
      if (student.sizes[d] == 1) continue;
      int place = dims++;
      for (; place > 0 && student.strides[order[place - 1]] < student.strides[d]; --place)
        order[place] = order[place - 1];
      order[place] = d;
    }
    for (int t = 0; t < 3; ++t) batch_stride[t] = tensors[t]->strides[0];
    for (int i = 0; i < dims; ++i) {
      const int64_t size = student.sizes[order[i]];
      bool merges = ndim > 0;
      for (int t = 0; t < 3 && merges; ++t)
        merges = strides[t][ndim - 1] == tensors[t]->strides[order[i]] * size;
      if (merges)
        sizes[ndim - 1] *= size;
      else
        sizes[ndim++] = size;
      for (int t = 0; t < 3; ++t) strides[t][ndim - 1] = tensors[t]->strides[order[i]];
    }
    if (ndim == 0) return;
    length = sizes[--ndim];
    for (int t = 0; t < 3; ++t) run_stride[t] = strides[t][ndim];
    for (int d = 0; d < ndim; ++d) outer *= sizes[d];
  }

  void offsets(int64_t sample, int64_t run, int64_t (&out)[3]) const {
    for (int t = 0; t < 3; ++t) out[t] = sample * batch_stride[t];
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t index = run % sizes[d];
      run /= sizes[d];
      for (int t = 0; t < 3; ++t) out[t] += index * strides[t][d];
    }
  }
};

// What happens to a stretch of contiguous elements: the sum of squared differences, and
// coefficient · (student − teacher) where `write`.
template <class A, class S, class T, class G>
inline vec_t<A> squares(const S* s, const T* t, G* g, int n, A coefficient, bool write,
                        bool non_temporal) {
  constexpr int W = Simd<A>::width;
  vec_t<A> first = {}, second = {};
  const auto some = [&](int i, int lanes) {
    const auto a = load_part<A>(s + i, lanes, A(0)) - load_part<A>(t + i, lanes, A(0));
    first += a * a;
    if (write) store_part(a * coefficient, g + i, lanes);
  };
  int i = 0;
  if (non_temporal) some(0, i = until_aligned<A>(g, n));
  for (; i + 2 * W <= n; i += 2 * W) {
    const auto a = load_as<A>(s + i) - load_as<A>(t + i);
    const auto b = load_as<A>(s + i + W) - load_as<A>(t + i + W);
    first += a * a;
    second += b * b;
    if (non_temporal) {
      stream(a * coefficient, g + i);
      stream(b * coefficient, g + i + W);
    } else if (write) {
      store(a * coefficient, g + i);
      store(b * coefficient, g + i + W);
    }
  }
  for (; i < n; i += W) some(i, n - i < W ? n - i : W);
  return first + second;
}

// f(null pointers of the two storage types), unless a loop for just these two is not worth having.
template <class A, class F>
bool with_storages(DType student, DType teacher, const F& f) {
  bool called = false;
  with_storage(student, [&](auto* one) {
    with_storage(teacher, [&](auto* other) {
      using S = std::remove_pointer_t<decltype(one)>;
      using T = std::remove_pointer_t<decltype(other)>;
      if constexpr (__is_same(S, T) || sizeof(S) + sizeof(T) + sizeof(A) <= 12) {
        f(one, other);
        called = true;
      }
    });
  });
  return called;
}

template <class A>
double stretch(const Tensor& student, const Tensor& teacher, const Tensor* gradient,
               const int64_t (&offset)[3], const int64_t (&stride)[3], int n, A coefficient) {
  const bool contiguous = stride[0] == 1 && stride[1] == 1 && stride[2] == 1;
  double total = 0;
  const auto in_place = [&](auto* one, auto* other) {
    using S = std::remove_pointer_t<decltype(one)>;
    using T = std::remove_pointer_t<decltype(other)>;
    S* g = gradient ? at<S>(*gradient, offset[2]) : nullptr;
    total = sum<A>(squares(at<S>(student, offset[0]), at<T>(teacher, offset[1]), g, n, coefficient,
                           gradient != nullptr, gradient && gradient->non_temporal));
  };
  if (contiguous && with_storages<A>(student.dtype, teacher.dtype, in_place)) return total;
  alignas(64) A s[kMostStretch], t[kMostStretch], g[kMostStretch];
  gather(student, offset[0], stride[0], n, s);
  gather(teacher, offset[1], stride[1], n, t);
  total = sum<A>(squares(s, t, g, n, coefficient, gradient != nullptr, false));
  if (gradient) scatter(g, n, *gradient, offset[2], stride[2]);
  return total;
}

// Visits all elements in pieces that do not depend on the number of threads. `sums` has one per
// sample, or is null; `coefficient(sample)` is that of the gradient.
template <class A, class C>
void visit(const Tensor& student, const Tensor& teacher, const Tensor* gradient, double* sums,
           int threads, const C& coefficient) {
  const Runs runs(student, teacher, gradient ? *gradient : student);
  const int64_t size = thresholds.hint_piece, step = thresholds.hint_stretch;
  const int64_t per_sample = runs.outer * runs.length;
  if (per_sample == 0 || runs.batch == 0) {
    for (int64_t b = 0; sums && b < runs.batch; ++b) sums[b] = 0;
    return;
  }
  // Short runs are taken several to a piece, long ones cut into several pieces.
  const int64_t cuts = (runs.length + size - 1) / size;
  const int64_t together = cuts > 1 ? 1 : (size + runs.length - 1) / runs.length;
  const int64_t groups = (runs.outer + together - 1) / together;
  const int64_t pieces = groups * cuts;
  Array<double> partial(runs.batch * pieces);
  const int wanted = threads_for(runs.batch * per_sample, threads);
  parallel_for(runs.batch * pieces, wanted, [&](int64_t work) {
    const int64_t sample = work / pieces, piece = work % pieces;
    const int64_t group = piece / cuts, cut = piece % cuts;
    const int64_t begin = cut * size;
    const int64_t end = begin + size < runs.length ? begin + size : runs.length;
    const int64_t last = (group + 1) * together < runs.outer ? (group + 1) * together : runs.outer;
    const A factor = coefficient(sample);
    double total = 0;
    for (int64_t run = group * together; run < last; ++run) {
      int64_t base[3];
      runs.offsets(sample, run, base);
      for (int64_t i = begin; i < end; i += step) {
        const int n = int(end - i < step ? end - i : step);
        const int64_t from[3] = {base[0] + i * runs.run_stride[0], base[1] + i * runs.run_stride[1],
                                 base[2] + i * runs.run_stride[2]};
        total += stretch<A>(student, teacher, gradient, from, runs.run_stride, n, factor);
      }
    }
    partial[work] = total;
  });
  for (int64_t b = 0; sums && b < runs.batch; ++b) {
    sums[b] = 0;
    for (int64_t i = 0; i < pieces; ++i) sums[b] += partial[b * pieces + i];
  }
}

template <class A>
void forward(const Tensor& student, const Tensor& teacher, double* losses, double scale,
             double coefficient, const Tensor& gradient, int threads) {
  visit<A>(student, teacher, gradient ? &gradient : nullptr, losses, threads,
           [&](int64_t) { return A(coefficient); });
  for (int64_t b = 0; b < student.sizes[0]; ++b) losses[b] *= scale;
}

template <class A>
void backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
              double coefficient, const Tensor& to_student, const Tensor& to_teacher, int threads) {
  const A* factors = at<A>(grad_output, 0);
  const auto factor = [&](int64_t sample) {
    return A(coefficient * double(factors[grad_output.ndim ? sample : 0]));
  };
  if (to_student) visit<A>(student, teacher, &to_student, nullptr, threads, factor);
  if (to_teacher) visit<A>(teacher, student, &to_teacher, nullptr, threads, factor);
}

void forward_any(const Tensor& student, const Tensor& teacher, bool in_double, double* losses,
                 double scale, double coefficient, const Tensor& gradient, int threads) {
  (in_double ? forward<double> : forward<float>)(student, teacher, losses, scale, coefficient,
                                                 gradient, threads);
}

void backward_any(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                  double coefficient, const Tensor& to_student, const Tensor& to_teacher,
                  int threads) {
  const bool in_double = grad_output.dtype == DType::f64;
  (in_double ? backward<double> : backward<float>)(grad_output, student, teacher, coefficient,
                                                   to_student, to_teacher, threads);
}

}  // namespace

extern const HintKernels hint_kernels{forward_any, backward_any};

}  // namespace fastkd::FASTKD_ISA
