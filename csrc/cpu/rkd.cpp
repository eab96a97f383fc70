// Relations between samples: squared distances, and the losses on them. All in double, because the
// cosine of an angle is a difference of squared distances.
#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace fastkd::FASTKD_ISA {
namespace {

using vec = vec_t<double>;
constexpr int W = Simd<double>::width;

// Squared distances: tiles of kRows points by kPanel others, some coordinates at a time.

constexpr int kRows = 4, kPanel = 2 * W;

// Some coordinates of kPanel points, those of one coordinate side by side; 0 beyond the last point.
template <class S>
void pack(const S* x, int64_t width, int64_t points, int depth, double* to) {
  for (int lane = 0; lane < kPanel; ++lane)
    for (int d = 0; d < depth; ++d)
      to[d * kPanel + lane] = lane < points ? double(x[lane * width + d]) : 0;
}

inline void tile(const double* rows, const double* columns, int depth, vec (&sums)[kRows][2]) {
  for (int d = 0; d < depth; ++d) {
    const vec a = load<double>(columns + d * kPanel), b = load<double>(columns + d * kPanel + W);
    for (int r = 0; r < kRows; ++r) {
      const vec x = splat(rows[d * kPanel + r]);
      sums[r][0] += (a - x) * (a - x);
      sums[r][1] += (b - x) * (b - x);
    }
  }
}

// The distances from one panel's points to another's, of some coordinates: added to those before.
void panels(const double* rows, const double* columns, int depth, int64_t row, int64_t column,
            int64_t n, bool is_first, double* to) {
  const int lanes = int(n - column < kPanel ? n - column : kPanel);
  for (int begin = 0; begin < kPanel && row + begin < n; begin += kRows) {
    vec sums[kRows][2] = {};
    tile(rows + begin, columns, depth, sums);
    for (int r = 0; r < kRows && row + begin + r < n; ++r) {
      double* out = to + (row + begin + r) * n + column;
      alignas(64) double found[kPanel];
      store(sums[r][0], found);
      store(sums[r][1], found + W);
      for (int lane = 0; lane < lanes; ++lane)
        out[lane] = is_first ? found[lane] : out[lane] + found[lane];
    }
  }
}

template <class S>
void squares_of(const S* x, int64_t n, int64_t width, double* to, int available) {
  if (width == 0)
    for (int64_t i = 0; i < n * n; ++i) to[i] = 0;
  const int64_t count = (n + kPanel - 1) / kPanel;
  const int threads = threads_for(n * n * width / 16, available);
  const int64_t most = width < thresholds.depth ? width : thresholds.depth;
  Array<double> packed(count * kPanel * most);
  for (int64_t first = 0; first < width; first += most) {
    const int depth = int(width - first < most ? width - first : most);
    const auto panel = [&](int64_t p) { return packed.data() + p * kPanel * depth; };
    parallel_for(count, threads, [&](int64_t p) {
      pack(x + p * kPanel * width + first, width, n - p * kPanel, depth, panel(p));
    });
    // Above the diagonal alone; a long row and a short one in turns, for threads to have the same.
    parallel_for(count, threads, [&](int64_t work) {
      const int64_t p = work % 2 ? count - 1 - work / 2 : work / 2;
      for (int64_t q = p; q < count; ++q)
        panels(panel(p), panel(q), depth, p * kPanel, q * kPanel, n, first == 0, to);
    });
  }
  parallel_for(n, threads_for(n * n, available), [&](int64_t i) {
    for (int64_t j = 0; j < i; ++j) to[i * n + j] = to[j * n + i];
  });
}

void squares(const Tensor& x, double* to, int threads) {
  with_storage(x.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if constexpr (sizeof(S) >= 4) squares_of(at<S>(x, 0), x.sizes[0], x.sizes[1], to, threads);
  });
}

// Of NaN: NaN.
inline vec clamp(vec x, double bound) {
  return x > bound ? splat(bound) : x < -bound ? splat(-bound) : x;
}

// Huber(r), given its derivative h.
inline vec huber(vec r, vec h) { return h * (r - 0.5 * h); }

// One over the distance; 0 for points that coincide.
inline vec inverse(vec square) { return square == 0 ? vec{} : 1 / sqrt(square); }

inline double total(Array<double>& partial, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += partial[i];
  return sum;
}

// One over the mean of the positive distances; 1 where none is. `count`: how many are.
double inverse_mean(const double* squares, int64_t n, double* count, int threads) {
  Array<double> sums(n), counts(n);
  parallel_for(n, threads, [&](int64_t i) {
    vec sum = {}, positive = {};
    over_vectors<double>(n, [&](int64_t j, auto lanes) {
      const vec s = load_lanes<double>(squares + i * n + j, lanes, 0.0);
      sum += s > 0 ? sqrt(s) : vec{};
      positive += s > 0 ? splat(1.0) : vec{};
    });
    sums[i] = FASTKD_ISA::sum<double>(sum);
    counts[i] = FASTKD_ISA::sum<double>(positive);
  });
  *count = total(counts, n);
  return *count > 0 ? *count / total(sums, n) : 1;
}

double distance(const double* student, const double* teacher, int64_t n, double* slopes,
                double delta, int available) {
  const int threads = threads_for(n * n, available);
  double count, unused;
  const double to_student = inverse_mean(student, n, &count, threads);
  const double to_teacher = inverse_mean(teacher, n, &unused, threads);
  const auto difference = [&](vec s, vec t) { return sqrt(s) * to_student - sqrt(t) * to_teacher; };
  Array<double> losses(n), moments(n);
  parallel_for(n, threads, [&](int64_t i) {
    vec loss = {}, moment = {};
    over_vectors<double>(n, [&](int64_t j, auto lanes) {
      const vec s = load_lanes<double>(student + i * n + j, lanes, 0.0);
      const vec t = load_lanes<double>(teacher + i * n + j, lanes, 0.0);
      const vec r = difference(s, t), h = clamp(r, delta);
      loss += huber(r, h);
      moment += h * sqrt(s);
    });
    losses[i] = sum<double>(loss);
    moments[i] = sum<double>(moment);
  });
  const double pairs = double(n) * double(n);
  if (slopes != nullptr) {
    // Each distance also changes the mean that all are divided by.
    const double by_mean = count > 0 ? to_student * total(moments, n) / count : 0;
    const double scale = to_student / pairs;
    parallel_for(n, threads, [&](int64_t i) {
      over_vectors<double>(n, [&](int64_t j, auto lanes) {
        const vec s = load_lanes<double>(student + i * n + j, lanes, 0.0);
        const vec t = load_lanes<double>(teacher + i * n + j, lanes, 0.0);
        const vec h = clamp(difference(s, t), delta);
        store_lanes<double>(scale * (h - by_mean) * inverse(s), slopes + i * n + j, lanes);
      });
    });
  }
  return total(losses, n) / pairs;
}

// Squared distances and one over the distances.
struct Side {
  const double* squares;
  const double* inverses;
};

// The angles at I vertices between the way to j and the ways to all k. Half of Σ_i h_ijk u_ij u_ik
// is added to `sums`, by k; `turns` gets the derivatives by s_ij from these vertices. u is one over
// a distance, h the derivative of Huber.
template <int I, bool with_slopes>
inline vec angles(const Side& student, const Side& teacher, int64_t n, int64_t i, int64_t j,
                  double delta, double* sums, double* turns) {
  double s_ij[I], t_ij[I], half_s[I], half_t[I];
  for (int v = 0; v < I; ++v) {
    const int64_t at = (i + v) * n + j;
    s_ij[v] = student.squares[at], half_s[v] = 0.5 * student.inverses[at];
    t_ij[v] = teacher.squares[at], half_t[v] = 0.5 * teacher.inverses[at];
  }
  vec loss = {}, ways[I] = {}, radial[I] = {};
  over_vectors<double>(n, [&](int64_t k, auto lanes) {
    const auto of = [&](const double* matrix, int64_t row) {
      return load_lanes<double>(matrix + row * n + k, lanes, 0.0);
    };
    const vec s_jk = of(student.squares, j), t_jk = of(teacher.squares, j);
    vec sum = {};
    for (int v = 0; v < I; ++v) {
      const vec w = half_s[v] * of(student.inverses, i + v);
      const vec c = (s_ij[v] + of(student.squares, i + v) - s_jk) * w;
      const vec w_t = half_t[v] * of(teacher.inverses, i + v);
      const vec r = c - (t_ij[v] + of(teacher.squares, i + v) - t_jk) * w_t;
      const vec h = clamp(r, delta);
      loss += huber(r, h);
      if (with_slopes) {
        sum += h * w;
        ways[v] += h * w;
        radial[v] += h * c;
      }
    }
    if (with_slopes)
      store_lanes<double>(sum + load_lanes<double>(sums + k, lanes, 0.0), sums + k, lanes);
  });
  for (int v = 0; with_slopes && v < I; ++v)
    turns[i + v] = 2 * sum<double>(ways[v]) - 4 * half_s[v] * half_s[v] * sum<double>(radial[v]);
  return loss;
}

template <bool with_slopes>
double angle(const double* student, const double* teacher, int64_t n, double* slopes, double delta,
             int available) {
  Array<double> inverse_s(n * n), inverse_t(n * n), turns(with_slopes ? n * n : 0);
  const int few = threads_for(n * n, available), many = threads_for(n * n * n / 4, available);
  parallel_for(n, few, [&](int64_t i) {
    over_vectors<double>(n, [&](int64_t j, auto lanes) {
      const auto put = [&](const double* from, double* to) {
        store_lanes<double>(inverse(load_lanes<double>(from + i * n + j, lanes, 0.0)),
                            to + i * n + j, lanes);
      };
      put(student, inverse_s.data());
      put(teacher, inverse_t.data());
    });
  });
  const Side s{student, inverse_s.data()}, t{teacher, inverse_t.data()};
  const int64_t size = thresholds.tile, tiles = (n + size - 1) / size;
  Array<double> losses(tiles);
  parallel_for(tiles, many, [&](int64_t tile) {
    const int64_t first = tile * size, last = first + size < n ? first + size : n;
    vec loss = {};
    if (with_slopes)
      for (int64_t at = first * n; at < last * n; ++at) slopes[at] = 0;
    const auto rows = [&](int64_t i, auto vertices) {
      for (int64_t j = first; j < last; ++j)
        loss += angles<decltype(vertices)::value, with_slopes>(s, t, n, i, j, delta, slopes + j * n,
                                                               turns.data() + j * n);
    };
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) rows(i, std::integral_constant<int, 2>{});
    if (i < n) rows(i, std::integral_constant<int, 1>{});
    losses[tile] = sum<double>(loss);
  });
  const double scale = 1 / (double(n) * double(n) * double(n));
  // s_jk is the side opposite to each vertex, and a leg of the angles at j and at k.
  for (int64_t j = 0; with_slopes && j < n; ++j) {
    for (int64_t k = 0; k < j; ++k) {
      const double legs = turns[j * n + k] + turns[k * n + j];
      slopes[j * n + k] = slopes[k * n + j] = scale * (legs - 2 * slopes[j * n + k]);
    }
    slopes[j * n + j] = 0;
  }
  return scale * total(losses, tiles);
}

double angle_any(const double* student, const double* teacher, int64_t n, double* slopes,
                 double delta, int threads) {
  return (slopes ? angle<true> : angle<false>)(student, teacher, n, slopes, delta, threads);
}

}  // namespace

extern const RkdKernels rkd_kernels{squares, distance, angle_any};

}  // namespace fastkd::FASTKD_ISA
