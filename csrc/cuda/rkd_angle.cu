// The loss on angles: all triangles, and no more memory than the sides take.
//
// All of it is float64: angles at points that are close to each other would lose their digits in
// float32.
#include <algorithm>

#include "rkd.h"

namespace fastkd::cuda {

using namespace rkd;

namespace {

constexpr int kSide = 16;  // threads along each side of a tile of pairs
constexpr int kThreads = kSide * kSide;
constexpr int kWarps = kThreads / kWarp;
constexpr int kThird = 16;  // points that pairs meet at a time

// Of the student and of the teacher; half the square of a side is exact.
struct alignas(kAccess) Both {
  double student;
  double teacher;
};

struct Side {
  Both half;     // its square, relative to that of the mean side
  Both inverse;  // of its length; 0 where that is 0
};

template <int K>
struct Sides {
  Both half[kThird][K * kSide];
  Both inverse[kThird][K * kSide];
  __device__ __forceinline__ Side at(int c, int point) const {
    return {half[c][point], inverse[c][point]};
  }
};

template <int K>
struct Shared {
  Sides<K> sides[2];
  SharedSums<1, kWarps> sums;
};

// What cuda_check knows them by.
using SharedOfPair = Shared<1>;
using SharedOfPairs = Shared<2>;

__device__ __forceinline__ double inverse_root(double square) {
  return square == 0 ? 0 : rsqrt(square);
}

// What a triangle makes of the angle between two sides, whose squares less the third one's are
// twice `student` and `teacher`.
struct Angle {
  double weight;  // the inverse of the product of the student's sides
  double cosine;
  double excess;  // over the teacher's
  double slope;

  __device__ __forceinline__ Angle(double student, double teacher, const Both& one,
                                   const Both& other, double delta)
      : weight(one.student * other.student),
        cosine(product(student, weight)),
        // Equal sides differ by 0.
        excess(cosine - product(teacher, one.teacher * other.teacher)),
        slope(huber_slope(excess, delta)) {}
};

// The side between two points a and b, and what all triangles that it has met make of it.
struct Pair {
  Side side;
  double along = 0;  // of the slope
  double turns = 0;  // the same, but for the inverse of the side's square

  // With a third point c: the sides from a and from b to it.
  template <bool kSlopes>
  __device__ __forceinline__ void meet(const Side& a, const Side& b, double delta, double& loss) {
    const Both &ab = side.half, &ac = a.half, &bc = b.half;
    const Angle at_c(ac.student + bc.student - ab.student, ac.teacher + bc.teacher - ab.teacher,
                     a.inverse, b.inverse, delta);
    loss += huber(at_c.excess, at_c.slope);
    if constexpr (kSlopes) {
      const Both less{ac.student - bc.student, ac.teacher - bc.teacher};
      const Angle at_a(ab.student + less.student, ab.teacher + less.teacher, side.inverse,
                       a.inverse, delta);
      const Angle at_b(ab.student - less.student, ab.teacher - less.teacher, side.inverse,
                       b.inverse, delta);
      along += at_a.slope * at_a.weight;
      along += at_b.slope * at_b.weight;
      along -= at_c.slope * at_c.weight;
      turns += at_a.slope * at_a.cosine;
      turns += at_b.slope * at_b.cosine;
    }
  }

  // But for the number of triangles.
  __device__ __forceinline__ double slope() const {
    const double square = 2 * side.half.student;
    return along - (square == 0 ? 0 : turns / square);
  }
};

struct Call {
  Distances distances;
  const Totals* totals;
  int n;
  double delta;
  Loss loss;
  double* slopes;
  double* partial;
};

// Every pair of points meets every third one: so each slope is one thread's sum.
template <int K, bool kSlopes>
struct Triangles {
  static constexpr int kTile = K * kSide;
  const Call& call;
  Shared<K>& shared;
  const Both scale;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;

  __device__ Triangles(const Call& call, Shared<K>& shared)
      : call(call),
        shared(shared),
        scale{scale_of(call.totals->mean(0)), scale_of(call.totals->mean(1))} {}

  __device__ static __forceinline__ double scale_of(double mean) { return 0.5 / (mean * mean); }

  // Where there is no point a side is 0, and so is what comes of it.
  __device__ __forceinline__ Side side(int i, int j) const {
    Both half{0, 0};
    if (i < call.n && j < call.n) {
      const int64_t at = int64_t(i) * call.n + j;
      half = {call.distances.squares[0][at] * scale.student,
              call.distances.squares[1][at] * scale.teacher};
    }
    return {half, {inverse_root(2 * half.student), inverse_root(2 * half.teacher)}};
  }

  // The sides from some third points to the points of a tile.
  __device__ __forceinline__ void fill(Sides<K>& sides, int third, int first) const {
#pragma unroll
    for (int i = 0; i < kThird * kTile / kThreads; ++i) {
      const int at = i * kThreads + threadIdx.x, c = at / kTile, point = at % kTile;
      const Side found = side(third + c, first + point);
      sides.half[c][point] = found.half;
      sides.inverse[c][point] = found.inverse;
    }
  }

  // The sum of the losses of a tile's pairs; writes their slopes.
  __device__ __forceinline__ double over(const TileOfPairs& tile) const {
    const int first_a = int(tile.row) * kTile, first_b = int(tile.column) * kTile;
    Pair pairs[K][K];
#pragma unroll
    for (int p = 0; p < K; ++p)
#pragma unroll
      for (int q = 0; q < K; ++q)
        pairs[p][q].side = side(first_a + p * kSide + y, first_b + q * kSide + x);
    double loss = 0;
    for (int third = 0; third < call.n; third += kThird) {
      __syncthreads();
      fill(shared.sides[0], third, first_a);
      fill(shared.sides[1], third, first_b);
      __syncthreads();
#pragma unroll(4 / (K * K))
      for (int c = 0; c < kThird; ++c)
#pragma unroll
        for (int p = 0; p < K; ++p)
#pragma unroll
          for (int q = 0; q < K; ++q)
            pairs[p][q].template meet<kSlopes>(shared.sides[0].at(c, p * kSide + y),
                                               shared.sides[1].at(c, q * kSide + x), call.delta,
                                               loss);
    }
    if constexpr (kSlopes)
#pragma unroll
      for (int p = 0; p < K; ++p)
#pragma unroll
        for (int q = 0; q < K; ++q)
          store(first_a + p * kSide + y, first_b + q * kSide + x, pairs[p][q].slope());
    // Above the diagonal, a pair stands for its mirror image, too.
    return first_a == first_b ? loss : 2 * loss;
  }

  __device__ __forceinline__ void store(int a, int b, double slope) const {
    if (a > b || b >= call.n) return;
    slope = a == b ? 0 : slope * (2 * scale.student / count());
    call.slopes[int64_t(a) * call.n + b] = slope;
    call.slopes[int64_t(b) * call.n + a] = slope;
  }

  __device__ __forceinline__ double count() const {
    return double(call.n) * double(call.n) * double(call.n);
  }
};

template <int K, bool kSlopes>
__global__ void __launch_bounds__(kThreads, K == 1 ? 4 : 2)
    rkd_angle_kernel(const __grid_constant__ Call call, int64_t tiles,
                     const __grid_constant__ Tickets tickets) {
  Shared<K>& shared = shared_memory<Shared<K>>();
  const Triangles<K, kSlopes> triangles(call, shared);
  double loss[1] = {};
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x)
    loss[0] += triangles.over(tile_of_pairs(tile));
  if (grid_sums(loss, call.partial, tickets, shared.sums) && threadIdx.x == 0)
    call.loss.store(loss[0] / triangles.count());
}

// Takes 2 × 2 pairs a thread, which access shared memory less often, where blocks enough remain to
// fill the chip; otherwise one.
template <bool kSlopes, int K = 2>
void launch_angle(const Call& call, const Tickets& tickets, const Stream& stream) {
  constexpr auto kernel = rkd_angle_kernel<K, kSlopes>;
  constexpr int64_t tile = K * kSide;
  const int64_t tiles = tiles_of_pairs((call.n + tile - 1) / tile);
  Grid grid{1, kThreads, sizeof(Shared<K>)};
  if constexpr (K > 1)
    if (tiles < resident_clusters(kernel, grid, stream))
      return launch_angle<kSlopes, 1>(call, tickets, stream);
  grid.blocks = std::min(tiles, kMostBlocks);
  launch(kernel, grid, stream, call, tiles, tickets);
}

}  // namespace

void rkd_angle(const Place& place, const Tensor& student, const Tensor& teacher, const Tensor& loss,
               const Tensor& slopes, const Tensor& memory, double delta) {
  const Stream stream(place);
  const Distances distances(student, teacher);
  if (distances.count == 0) return clear(loss, stream);
  Scratch& scratch = *memory.as<Scratch>();
  find_totals(distances, scratch, stream);
  const Call call{distances,      &scratch.totals, int(student.sizes[0]),
                  delta,          Loss(loss),      reinterpret_cast<double*>(slopes.data),
                  scratch.partial};
  (slopes ? launch_angle<true> : launch_angle<false>)(call, tickets(scratch, stream), stream);
}

}  // namespace fastkd::cuda
