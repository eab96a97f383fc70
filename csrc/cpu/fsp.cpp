// The flow between layers: a layer's maxima, as many as a smaller layer has positions, and where
// they were.
#include <algorithm>
#include <limits>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Of one dimension. They overlap where `count` does not divide `size`.
struct Bins {
  int64_t size, count;
  int64_t begin(int64_t i) const { return i * size / count; }
  int64_t end(int64_t i) const { return ((i + 1) * size + count - 1) / count; }
};

// Maxima and where they were, so far; of equal ones the first stays. NaN is above all.
template <class A>
struct Best {
  A* values;
  int32_t* places;

  void clear(int n, int32_t place) const {
    for (int i = 0; i < n; ++i) {
      values[i] = -std::numeric_limits<A>::infinity();
      places[i] = place;
    }
  }
  void take(const A* line, int n, int32_t place) const {
    for (int i = 0; i < n; ++i) {
      const A x = line[i], value = values[i];
      const bool wins = x > value || x != x;
      values[i] = wins ? x : value;
      places[i] = wins ? place : places[i];
    }
  }
};

// Whether a pixel's channels lie side by side, and not a row's pixels.
bool is_channels_last(const Tensor& x) { return x.strides[1] == 1 && x.strides[3] != 1; }

int64_t offset_of(const Tensor& x, int64_t b, int64_t channel, int64_t row, int64_t column) {
  return b * x.strides[0] + channel * x.strides[1] + row * x.strides[2] + column * x.strides[3];
}

struct Shape {
  int64_t batch, channels;
  Bins rows, columns;
  Shape(const Tensor& features, const Tensor& pooled)
      : batch(features.sizes[0]),
        channels(features.sizes[1]),
        rows{features.sizes[2], pooled.sizes[2]},
        columns{features.sizes[3], pooled.sizes[3]} {}
  // Where the maxima and the winners of a row of bins begin.
  int64_t bins(int64_t b, int64_t channel, int64_t i) const {
    return ((b * channels + channel) * rows.count + i) * columns.count;
  }
};

// One channel of a sample: the maxima of each column of a row of bins, then those of each bin.
template <class A>
void pool_plane(const Tensor& features, A* pooled, int32_t* winners, const Shape& shape, int64_t b,
                int64_t channel) {
  const int n = int(shape.columns.size);
  A* line = scratch<A>(3 * n);
  const Best<A> best{line + n, reinterpret_cast<int32_t*>(line + 2 * n)};
  for (int64_t i = 0; i < shape.rows.count; ++i) {
    best.clear(n, int32_t(shape.rows.begin(i)));
    for (int64_t row = shape.rows.begin(i); row < shape.rows.end(i); ++row) {
      gather(features, offset_of(features, b, channel, row, 0), features.strides[3], n, line);
      best.take(line, n, int32_t(row));
    }
    const int64_t to = shape.bins(b, channel, i);
    for (int64_t j = 0; j < shape.columns.count; ++j) {
      int64_t winner = shape.columns.begin(j);
      for (int64_t c = winner + 1; c < shape.columns.end(j); ++c) {
        const A x = best.values[c], value = best.values[winner];
        if (x > value || x != x || (x == value && best.places[c] < best.places[winner])) winner = c;
      }
      pooled[to + j] = best.values[winner];
      if (winners != nullptr) winners[to + j] = int32_t(best.places[winner] * n + winner);
    }
  }
}

// A row of bins of a sample, all channels.
template <class A>
void pool_row(const Tensor& features, A* pooled, int32_t* winners, const Shape& shape, int64_t b,
              int64_t i) {
  const int n = int(shape.channels);
  A* line = scratch<A>(3 * n);
  const Best<A> best{line + n, reinterpret_cast<int32_t*>(line + 2 * n)};
  const auto place = [&](int64_t row, int64_t c) { return int32_t(row * shape.columns.size + c); };
  for (int64_t j = 0; j < shape.columns.count; ++j) {
    best.clear(n, place(shape.rows.begin(i), shape.columns.begin(j)));
    for (int64_t row = shape.rows.begin(i); row < shape.rows.end(i); ++row)
      for (int64_t c = shape.columns.begin(j); c < shape.columns.end(j); ++c) {
        gather(features, offset_of(features, b, 0, row, c), features.strides[1], n, line);
        best.take(line, n, place(row, c));
      }
    for (int k = 0; k < n; ++k) {
      pooled[shape.bins(b, k, i) + j] = best.values[k];
      if (winners != nullptr) winners[shape.bins(b, k, i) + j] = best.places[k];
    }
  }
}

template <class A>
void pool_as(const Tensor& features, const Tensor& pooled, int32_t* winners, int available) {
  const Shape shape(features, pooled);
  const int threads = threads_for(features.numel(), available);
  const bool across = is_channels_last(features);
  const int64_t parts = across ? shape.rows.count : shape.channels;
  parallel_for(shape.batch * parts, threads, [&](int64_t work) {
    (across ? pool_row<A> : pool_plane<A>)(features, at<A>(pooled, 0), winners, shape, work / parts,
                                           work % parts);
  });
}

void pool(const Tensor& features, const Tensor& pooled, int32_t* winners, int threads) {
  const bool in_double = pooled.dtype == DType::f64;
  (in_double ? pool_as<double> : pool_as<float>)(features, pooled, winners, threads);
}

// Channels that are written together where they lie side by side.
constexpr int64_t kBlock = 16;

template <class A>
void unpool_as(const Tensor& grad_output, const int32_t* winners, const Tensor& gradient,
               int available) {
  const Shape shape(gradient, grad_output);
  const int64_t rows = shape.rows.size, columns = shape.columns.size;
  const bool across = is_channels_last(gradient);
  const int64_t block = across ? kBlock : 1, blocks = (shape.channels + block - 1) / block;
  parallel_for(shape.batch * blocks, threads_for(gradient.numel(), available), [&](int64_t work) {
    const int64_t b = work / blocks, first = work % blocks * block;
    const int64_t count = shape.channels - first < block ? shape.channels - first : block;
    A* sums = scratch<A>(rows * columns * count);
    std::fill(sums, sums + rows * columns * count, A(0));
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < shape.rows.count; ++i) {
        const int32_t* won = winners + shape.bins(b, first + k, i);
        const A* from = at<A>(grad_output, offset_of(grad_output, b, first + k, i, 0));
        for (int64_t j = 0; j < shape.columns.count; ++j)
          sums[won[j] * count + k] += from[j * grad_output.strides[3]];
      }
    for (int64_t row = 0; row < rows; ++row) {
      const A* line = sums + row * columns * count;
      const int64_t to = offset_of(gradient, b, first, row, 0), stride = gradient.strides[3];
      if (across)
        for (int64_t c = 0; c < columns; ++c)
          scatter(line + c * count, int(count), gradient, to + c * stride, 1);
      else
        scatter(line, int(columns), gradient, to, stride);
    }
  });
}

void unpool(const Tensor& grad_output, const int32_t* winners, const Tensor& gradient,
            int threads) {
  const bool in_double = grad_output.dtype == DType::f64;
  (in_double ? unpool_as<double> : unpool_as<float>)(grad_output, winners, gradient, threads);
}

}  // namespace

extern const FspKernels fsp_kernels{pool, unpool};

}  // namespace fastkd::FASTKD_ISA
