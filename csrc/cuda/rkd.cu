// Squared distances between embeddings, and the loss on relative distances.
#include <algorithm>

#include "rkd.h"

namespace fastkd::cuda {

using namespace rkd;

namespace {

constexpr int kRows = 4;          // of each side that a warp holds
constexpr int kTile = 2 * kRows;  // of each side of a block, which is 2 × 2 warps
constexpr int kTileThreads = 4 * kWarp;

// The lanes of a warp take the features in turns, and each the differences of all the warp's pairs.
template <class S>
__global__ void __launch_bounds__(kTileThreads)
    squared_distances_kernel(const S* x, int64_t n, int64_t features, double* to) {
  const TileOfPairs tile = tile_of_pairs(blockIdx.x);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t i = tile.row * kTile + warp / 2 * kRows;
  const int64_t j = tile.column * kTile + warp % 2 * kRows;
  const S *one[kRows], *other[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // For rows that are not there the last one is read, and nothing written.
    one[r] = x + (i + r < n ? i + r : n - 1) * features;
    other[r] = x + (j + r < n ? j + r : n - 1) * features;
  }
  double sums[kRows][kRows] = {};
  for (int64_t k = lane; k < features; k += kWarp) {
    double a[kRows], b[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      a[r] = double(one[r][k]);
      b[r] = double(other[r][k]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kRows; ++c) {
        const double difference = a[r] - b[c];
        sums[r][c] += difference * difference;
      }
  }
  double sum = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kRows; ++c) {
      const double of_pair = warp_sum(sums[r][c]);
      if (lane == r * kRows + c) sum = of_pair;
    }
  const int64_t row = i + lane / kRows, column = j + lane % kRows;
  // Of a tile on the diagonal, what is below it would be written twice.
  if (lane >= kRows * kRows || column >= n || row > column) return;
  to[row * n + column] = sum;
  to[column * n + row] = sum;
}

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTogether = 4;  // blocks on a multiprocessor: registers enough that none is spilled

using SumsOfTotals = SharedSums<4, kWarps>;
using SumsOfLoss = SharedSums<2, kWarps>;

Grid grid_of(const Distances& distances, size_t shared_bytes) {
  const int64_t blocks = (distances.count + kThreads - 1) / kThreads;
  return {std::min(blocks, kMostBlocks), kThreads, shared_bytes};
}

// This thread's share of the distances.
template <class F>
__device__ __forceinline__ void each_of(const Distances& distances, const F& f) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < distances.count;
       i += int64_t(gridDim.x) * kThreads)
    f(i);
}

__global__ void __launch_bounds__(kThreads, kTogether)
    rkd_totals_kernel(Distances distances, Totals* totals, double* partial, Tickets tickets) {
  double sums[4] = {};
  each_of(distances, [&](int64_t i) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const double square = distances.squares[side][i];
      sums[side] += sqrt(square);
      sums[2 + side] += square == 0 ? 0 : 1;
    }
  });
  if (!grid_sums(sums, partial, tickets, shared_memory<SumsOfTotals>()) || threadIdx.x > 0) return;
  *totals = {{sums[0], sums[1]}, {sums[2], sums[3]}};
}

struct Comparison {
  double distance;  // the student's
  double relative;
  double excess;  // over the teacher's
  double slope;
};

struct Comparer {
  Distances distances;
  double delta;
  const Totals* totals;

  // f(i, comparison) of this thread's share of the distances.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    const double student = totals->mean(0), teacher = totals->mean(1);
    each_of(distances, [&](int64_t i) {
      const double distance = sqrt(distances.squares[0][i]);
      const double relative = distance / student;
      const double excess = relative - sqrt(distances.squares[1][i]) / teacher;
      f(i, Comparison{distance, relative, excess, huber_slope(excess, delta)});
    });
  }
};

// The loss, and what the slopes together make of the mean.
__global__ void __launch_bounds__(kThreads, kTogether)
    rkd_distance_kernel(Comparer comparer, Loss loss, double* through_mean, double* partial,
                        Tickets tickets) {
  double sums[2] = {};
  comparer.each([&](int64_t, const Comparison& c) {
    sums[0] += huber(c.excess, c.slope);
    sums[1] += c.slope * c.relative;
  });
  if (!grid_sums(sums, partial, tickets, shared_memory<SumsOfLoss>()) || threadIdx.x > 0) return;
  loss.store(sums[0] / double(comparer.distances.count));
  *through_mean = sums[1] / comparer.totals->count[0];
}

__global__ void __launch_bounds__(kThreads, kTogether)
    rkd_slopes_kernel(Comparer comparer, const double* through_mean, double* slopes) {
  const double of_mean = *through_mean;
  const double factor = 1 / (comparer.totals->mean(0) * double(comparer.distances.count));
  comparer.each([&](int64_t i, const Comparison& c) {
    slopes[i] = c.distance == 0 ? 0 : factor * (c.slope - of_mean) / c.distance;
  });
}

template <class S>
void launch_squared_distances(const Tensor& x, const Tensor& to, const Stream& stream) {
  const int64_t n = x.sizes[0];
  launch(squared_distances_kernel<S>, {tiles_of_pairs((n + kTile - 1) / kTile), kTileThreads},
         stream, reinterpret_cast<const S*>(x.data), n, x.sizes[1],
         reinterpret_cast<double*>(to.data));
}

}  // namespace

void rkd::find_totals(const Distances& distances, Scratch& scratch, const Stream& stream) {
  launch(rkd_totals_kernel, grid_of(distances, sizeof(SumsOfTotals)), stream, distances,
         &scratch.totals, scratch.partial, tickets(scratch, stream));
}

void squared_distances(const Place& place, const Tensor& x, const Tensor& to) {
  const Stream stream(place);
  if (x.sizes[0] == 0) return;
  (x.dtype == DType::f64 ? launch_squared_distances<double>
                         : launch_squared_distances<float>)(x, to, stream);
}

void rkd_distance(const Place& place, const Tensor& student, const Tensor& teacher,
                  const Tensor& loss, const Tensor& slopes, const Tensor& memory, double delta) {
  const Stream stream(place);
  const Distances distances(student, teacher);
  if (distances.count == 0) return clear(loss, stream);
  Scratch& scratch = *memory.as<Scratch>();
  find_totals(distances, scratch, stream);
  const Comparer comparer{distances, delta, &scratch.totals};
  launch(rkd_distance_kernel, grid_of(distances, sizeof(SumsOfLoss)), stream, comparer, Loss(loss),
         &scratch.through_mean, scratch.partial, tickets(scratch, stream));
  if (slopes)
    launch(rkd_slopes_kernel, grid_of(distances, 0), stream, comparer, &scratch.through_mean,
           reinterpret_cast<double*>(slopes.data));
}

}  // namespace fastkd::cuda
