// Attention maps and attention transfer, a sample at a time: its features are still in cache when
// the gradient reads them again.
#include "attention_map.h"
#include "distance.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Samples over threads; where samples are fewer, the chunks of each sample over threads.
struct Shares {
  int outer, inner;
  Shares(int64_t samples, int64_t elements, int available) {
    const int useful = threads_for(elements, available);
    outer = samples >= useful ? useful : 1;
    inner = samples >= useful ? 1 : useful;
  }
};

template <class F>
void over_chunks(int64_t positions, int threads, const F& f) {
  const int64_t size = thresholds.map_chunk;  // its sums stay in cache
  parallel_for((positions + size - 1) / size, threads, [&](int64_t chunk) {
    const int64_t first = chunk * size;
    f(first, int(positions - first < size ? positions - first : size));
  });
}

// f(a null pointer of the storage type, |x|^p specialised where that pays)
template <class A, class F>
void with_power(const Tensor& features, double p, const F& f) {
  with_storage(features.dtype, [&](auto* storage) {
    if (p == 1)
      f(storage, Power<A, 2>(p));
    else if (p == 2)
      f(storage, Power<A, 4>(p));
    else
      f(storage, Power<A, 0>(p));
  });
}

template <class A>
void map_sample(const Tensor& features, const Positions& where, int64_t sample, A* raw,
                int32_t* argmax, const MapParameters& p, int threads) {
  with_power<A>(features, p.p, [&](auto* storage, const auto& power) {
    using S = std::remove_pointer_t<decltype(storage)>;
    const S* x = at<S>(features, sample * where.batch_stride);
    over_chunks(where.count, threads, [&](int64_t first, int n) {
      map_chunk(x, where, p.kind, power, first, n, raw + first, argmax ? argmax + first : nullptr);
    });
  });
}

// Slopes by a map's positions become slopes by the features that won them.
template <class A>
void to_argmax(const Tensor& features, const Positions& where, int64_t sample, A* slopes,
               const int32_t* argmax, const MapParameters& p) {
  with_power<A>(features, p.p, [&](auto* storage, const auto& power) {
    using S = std::remove_pointer_t<decltype(storage)>;
    slopes_at_argmax(at<S>(features, sample * where.batch_stride), where, power, slopes, argmax);
  });
}

// Whether a sample is one stretch of planes, on both sides.
bool are_planes(const Positions& from, const Positions& to) {
  return from.layout() == Layout::planar && to.layout() == Layout::planar && from.is_dense() &&
         to.is_dense();
}

template <class A>
void gradient_sample(const Tensor& features, const Positions& from, const Tensor& gradient,
                     const Positions& to, int64_t sample, const A* slopes, A factor,
                     const int32_t* argmax, const MapParameters& p, int threads,
                     const Ahead& ahead) {
  constexpr int W = Simd<A>::width;
  const int64_t count = from.count, elements = from.channels * count;
  const int64_t size = thresholds.map_piece;
  A* scaled = scratch<A>(count + W);
  for (int64_t i = 0; i < count; ++i) scaled[i] = slopes[i] * factor;
  for (int64_t i = 0; i < W; ++i) scaled[count + i] = scaled[i % count];
  with_power<A>(features, p.p, [&](auto* storage, const auto& power) {
    using S = std::remove_pointer_t<decltype(storage)>;
    const S* x = at<S>(features, sample * from.batch_stride);
    S* g = at<S>(gradient, sample * to.batch_stride);
    if (p.kind == MapKind::max_pow)
      over_chunks(count, threads, [&](int64_t first, int n) {
        gradient_at_argmax(g, to, first, n, scaled + first, argmax + first);
      });
    else if (are_planes(from, to))
      parallel_for((elements + size - 1) / size, threads, [&](int64_t piece) {
        const int64_t begin = piece * size;
        const int64_t end = begin + size < elements ? begin + size : elements;
        gradient_of_planes(x, g, scaled, count, power, begin, end, gradient.non_temporal, ahead);
      });
    else
      over_chunks(count, threads, [&](int64_t first, int n) {
        gradient_chunk(x, from, g, to, power, first, n, scaled + first, gradient.non_temporal,
                       ahead);
      });
  });
}

// What `transfer` reads after the gradient of the sample before.
Ahead next_sample(const Tensor& student, const Positions& s, const Tensor& teacher,
                  const Positions& t, int64_t sample, const Shares& shares) {
  // A thread knows its own next sample only, and the last one of its share has none.
  const bool worth =
      shares.inner == 1 && sample < s.batch && s.batch >= thresholds.samples_ahead * shares.outer;
  if (!worth || !s.is_dense() || !t.is_dense() || s.count == 0 || s.channels == 0) return Ahead();
  const int64_t s_bytes = s.channels * s.count * size_of(student.dtype);
  const int64_t t_bytes = t.channels * t.count * size_of(teacher.dtype);
  return {teacher.data + sample * t.batch_stride * size_of(teacher.dtype),
          student.data + sample * s.batch_stride * size_of(student.dtype),
          int((t_bytes + s_bytes - 1) / s_bytes)};
}

template <class A>
void map(const Tensor& features, const Tensor& raw, int32_t* argmax, const MapParameters& p,
         int threads) {
  const Positions where(features, p.channel_dim);
  const Shares shares(where.batch, features.numel(), threads);
  parallel_for(where.batch, shares.outer, [&](int64_t b) {
    map_sample(features, where, b, at<A>(raw, b * where.count),
               argmax ? argmax + b * where.count : nullptr, p, shares.inner);
  });
}

template <class A>
void transfer(const Tensor& student, const Tensor& teacher, double* losses,
              const Tensor& student_slopes, int32_t* student_argmax, const Tensor& teacher_slopes,
              int32_t* teacher_argmax, const Tensor& gradient, const TransferParameters& transfer,
              const MapParameters& p, int threads) {
  const Positions s(student, p.channel_dim), t(teacher, p.channel_dim);
  const Positions g(gradient ? gradient : student, p.channel_dim);
  const int64_t count = s.count;
  const double scale = transfer.sample_scale(s.batch);
  const Shares shares(s.batch, student.numel() + teacher.numel(), threads);
  parallel_for(s.batch, shares.outer, [&](int64_t b) {
    A* slopes = at<A>(student_slopes, b * count);
    // The same scratch as `gradient_sample` takes, when this map is done with.
    A* other = teacher_slopes ? at<A>(teacher_slopes, b * count) : scratch<A>(count);
    // max_pow needs somewhere to put the teacher's argmax, wanted or not.
    Array<int32_t> unwanted(p.kind == MapKind::max_pow && !teacher_argmax ? count : 0);
    int32_t* s_argmax = student_argmax ? student_argmax + b * count : nullptr;
    int32_t* t_argmax = teacher_argmax ? teacher_argmax + b * count : unwanted.data();
    map_sample(teacher, t, b, other, t_argmax, p, shares.inner);
    map_sample(student, s, b, slopes, s_argmax, p, shares.inner);
    losses[b] = distance_slopes(slopes, other, count, bool(teacher_slopes), transfer, scale, p.eps);
    if (p.kind == MapKind::max_pow) {
      to_argmax(student, s, b, slopes, s_argmax, p);
      if (teacher_slopes) to_argmax(teacher, t, b, other, t_argmax, p);
    }
    if (gradient)
      gradient_sample(student, s, gradient, g, b, slopes, A(1), s_argmax, p, shares.inner,
                      next_sample(student, s, teacher, t, b + 1, shares));
  });
}

template <class A>
void backward(const Tensor& grad_output, const Tensor& features, const Tensor& slopes,
              const int32_t* argmax, const Tensor& gradient, const MapParameters& p, int threads) {
  const Positions from(features, p.channel_dim), to(gradient, p.channel_dim);
  const Shares shares(from.batch, features.numel(), threads);
  const A* factors = at<A>(grad_output, 0);
  parallel_for(from.batch, shares.outer, [&](int64_t b) {
    gradient_sample(features, from, gradient, to, b, at<A>(slopes, b * from.count),
                    factors[grad_output.ndim ? b : 0], argmax ? argmax + b * from.count : nullptr,
                    p, shares.inner, Ahead());
  });
}

// The maps' dtype is the arithmetic's.
void map_any(const Tensor& features, const Tensor& raw, int32_t* argmax, const MapParameters& p,
             int threads) {
  if (raw.dtype == DType::f64)
    map<double>(features, raw, argmax, p, threads);
  else
    map<float>(features, raw, argmax, p, threads);
}

void transfer_any(const Tensor& student, const Tensor& teacher, double* losses,
                  const Tensor& student_slopes, int32_t* student_argmax,
                  const Tensor& teacher_slopes, int32_t* teacher_argmax, const Tensor& gradient,
                  const TransferParameters& parameters, const MapParameters& p, int threads) {
  if (student_slopes.dtype == DType::f64)
    transfer<double>(student, teacher, losses, student_slopes, student_argmax, teacher_slopes,
                     teacher_argmax, gradient, parameters, p, threads);
  else
    transfer<float>(student, teacher, losses, student_slopes, student_argmax, teacher_slopes,
                    teacher_argmax, gradient, parameters, p, threads);
}

void backward_any(const Tensor& grad_output, const Tensor& features, const Tensor& slopes,
                  const int32_t* argmax, const Tensor& gradient, const MapParameters& p,
                  int threads) {
  if (slopes.dtype == DType::f64)
    backward<double>(grad_output, features, slopes, argmax, gradient, p, threads);
  else
    backward<float>(grad_output, features, slopes, argmax, gradient, p, threads);
}

}  // namespace

extern const AttentionKernels attention_kernels{map_any, transfer_any, backward_any};

}  // namespace fastkd::FASTKD_ISA
