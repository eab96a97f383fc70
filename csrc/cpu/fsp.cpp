// The flow between layers: a layer's maxima, as many as a smaller layer has positions, and where
// they were.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Where the bins of one dimension begin, and the places in each: computed once, for the divisions.
// They overlap where `count` does not divide `size`.
class Bins {
 public:
  Bins(int64_t size, int64_t count) : size(size), count(count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t end = ((i + 1) * size + count - 1) / count;
      begins_.push_back(i * size / count);
      widths_.push_back(end - begin(i));
      widest = width(i) > widest ? width(i) : widest;
    }
  }
  int64_t begin(int64_t i) const { return begins_[i]; }
  int64_t width(int64_t i) const { return widths_[i]; }
  // The place-th of one, or its last.
  int64_t at(int64_t i, int64_t place) const {
    return begin(i) + (place < width(i) ? place : width(i) - 1);
  }
  bool are_even() const { return size % count == 0; }

  const int64_t size, count;
  int64_t widest = 0;

 private:
  std::vector<int64_t> begins_, widths_;
};

constexpr int kBlock = 16;

// Maxima and where they were, so far, of whole blocks: what is left of one is scalar code, whose
// branches nobody can predict. Of equal ones the first stays, and NaN is above all.
template <class A>
struct Best {
  int64_t size;
  A* line;  // the next candidates
  A* values;
  int32_t* places;

  explicit Best(int64_t n) : size((n + kBlock - 1) / kBlock * kBlock) {
    line = scratch<A>(3 * size);
    values = line + size;
    places = reinterpret_cast<int32_t*>(values + size);
    std::fill(line + n, values, A(0));
  }
  void clear(int32_t place) const {
    for (int64_t i = 0; i < size / kBlock * kBlock; ++i) {
      values[i] = -std::numeric_limits<A>::infinity();
      places[i] = place;
    }
  }
  void take(int32_t place) const {
    for (int64_t i = 0; i < size / kBlock * kBlock; ++i) {
      const A x = line[i], value = values[i];
      const bool wins = x > value || (x != x && value == value);
      values[i] = wins ? x : value;
      places[i] = wins ? place : places[i];
    }
  }
};

// Of each bin of a row the element at `place`, or its last, which does not win again.
template <class A, class S>
void gather_bins(const S* row, int64_t stride, const Bins& columns, int64_t place, A* to) {
  const int64_t n = columns.count;
  const int64_t step = columns.widest * stride;
  if (!columns.are_even()) {
    for (int64_t j = 0; j < n; ++j) to[j] = widen(row[columns.at(j, place) * stride]);
  } else if (step == 2) {  // which vectors can do
    for (int64_t j = 0; j < n; ++j) to[j] = widen(row[2 * j + place * stride]);
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = widen(row[j * step + place * stride]);
  }
}

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
        rows(features.sizes[2], pooled.sizes[2]),
        columns(features.sizes[3], pooled.sizes[3]) {}
  // Where the maxima and the argmax of a row of bins begin.
  int64_t bins(int64_t b, int64_t channel, int64_t i) const {
    return ((b * channels + channel) * rows.count + i) * columns.count;
  }
};

// One channel of a sample, some rows of bins at a time.
template <class S, class A>
void pool_plane(const Tensor& features, A* pooled, int32_t* argmax, const Shape& shape, int64_t b,
                int64_t channel) {
  const Bins &rows = shape.rows, &columns = shape.columns;
  const int64_t group = (thresholds.bins + columns.count - 1) / columns.count;
  for (int64_t first = 0; first < rows.count; first += group) {
    const int64_t count = rows.count - first < group ? rows.count - first : group;
    const Best<A> best(count * columns.count);
    best.clear(0);
    for (int64_t down = 0; down < rows.widest; ++down)
      for (int64_t right = 0; right < columns.widest; ++right) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = rows.at(first + i, down);
          gather_bins(at<S>(features, offset_of(features, b, channel, row, 0)), features.strides[3],
                      columns, right, best.line + i * columns.count);
        }
        best.take(int32_t(down * columns.size + right));
      }
    const int64_t to = shape.bins(b, channel, first);
    for (int64_t i = 0; i < count * columns.count; ++i) pooled[to + i] = best.values[i];
    for (int64_t i = 0; argmax != nullptr && i < count; ++i)
      for (int64_t j = 0; j < columns.count; ++j) {
        const int64_t k = i * columns.count + j;
        argmax[to + k] =
            best.places[k] + int32_t(rows.begin(first + i) * columns.size + columns.begin(j));
      }
  }
}

// A row of bins of a sample, all channels.
template <class A>
void pool_row(const Tensor& features, A* pooled, int32_t* argmax, const Shape& shape, int64_t b,
              int64_t i) {
  const int64_t n = shape.channels;
  const Best<A> best(n);
  const auto place = [&](int64_t row, int64_t c) { return int32_t(row * shape.columns.size + c); };
  for (int64_t j = 0; j < shape.columns.count; ++j) {
    const int64_t row = shape.rows.begin(i), column = shape.columns.begin(j);
    best.clear(place(row, column));
    for (int64_t r = row; r < row + shape.rows.width(i); ++r)
      for (int64_t c = column; c < column + shape.columns.width(j); ++c) {
        gather(features, offset_of(features, b, 0, r, c), features.strides[1], n, best.line);
        best.take(place(r, c));
      }
    for (int64_t k = 0; k < n; ++k) {
      pooled[shape.bins(b, k, i) + j] = best.values[k];
      if (argmax != nullptr) argmax[shape.bins(b, k, i) + j] = best.places[k];
    }
  }
}

void pool(const Tensor& features, const Tensor& pooled, int32_t* argmax, int available) {
  const Shape shape(features, pooled);
  const int threads = threads_for(features.numel(), available);
  const bool across = is_channels_last(features);
  const int64_t parts = across ? shape.rows.count : shape.channels;
  with_storage(features.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = decltype(widen(S()));
    parallel_for(shape.batch * parts, threads, [&](int64_t work) {
      (across ? pool_row<A> : pool_plane<S, A>)(features, at<A>(pooled, 0), argmax, shape,
                                                work / parts, work % parts);
    });
  });
}

template <class A>
void unpool_as(const Tensor& grad_output, const int32_t* argmax, const Tensor& gradient,
               int available) {
  const Shape shape(gradient, grad_output);
  const int64_t rows = shape.rows.size, columns = shape.columns.size;
  const bool across = is_channels_last(gradient);
  // Channels that lie side by side are written together.
  const int64_t block = across ? kBlock : 1, blocks = (shape.channels + block - 1) / block;
  parallel_for(shape.batch * blocks, threads_for(gradient.numel(), available), [&](int64_t work) {
    const int64_t b = work / blocks, first = work % blocks * block;
    const int64_t count = shape.channels - first < block ? shape.channels - first : block;
    A* sums = scratch<A>(rows * columns * count);
    std::fill(sums, sums + rows * columns * count, A(0));
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < shape.rows.count; ++i) {
        const int32_t* won = argmax + shape.bins(b, first + k, i);
        const A* from = at<A>(grad_output, offset_of(grad_output, b, first + k, i, 0));
        for (int64_t j = 0; j < shape.columns.count; ++j)
          sums[won[j] * count + k] += from[j * grad_output.strides[3]];
      }
    for (int64_t row = 0; row < rows; ++row) {
      const A* line = sums + row * columns * count;
      const int64_t to = offset_of(gradient, b, first, row, 0), stride = gradient.strides[3];
      if (across)
        for (int64_t c = 0; c < columns; ++c)
          scatter(line + c * count, count, gradient, to + c * stride, 1);
      else
        scatter(line, columns, gradient, to, stride);
    }
  });
}

void unpool(const Tensor& grad_output, const int32_t* argmax, const Tensor& gradient, int threads) {
  const bool in_double = grad_output.dtype == DType::f64;
  (in_double ? unpool_as<double> : unpool_as<float>)(grad_output, argmax, gradient, threads);
}

}  // namespace

extern const FspKernels fsp_kernels{pool, unpool};

}  // namespace fastkd::FASTKD_ISA
