// Similarity-preserving distillation, from Gram matrices.
#include <algorithm>

#include "relations.h"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr double kEps = 1e-12;

// What a row's slopes are made of.
struct Row {
  double inverse[2];  // of the norms of the student's row and the teacher's
  double inner;       // the difference along the student's row
};

struct Scratch {
  double counter;
  double partial[kMostBlocks];
  Row* rows() { return reinterpret_cast<Row*>(this + 1); }
};

template <class A>
struct Grams {
  const A* student;
  const A* teacher;
  int64_t n;
};

// A row of zeros stays one.
__device__ __forceinline__ double inverse_of(double norm) {
  return norm == 0 ? 0 : 1 / (norm < kEps ? kEps : norm);
}

struct Shared {
  double squares[kWarps][2], sums_of_row[kWarps][2];
  SharedSums<1, kWarps> sums;
};

// The loss, and what there is to know of each row; one block a row.
template <class A>
__global__ void __launch_bounds__(kThreads)
    similarity_rows_kernel(Grams<A> grams, Loss loss, Row* rows, double* partial, Tickets tickets) {
  Shared& shared = shared_memory<Shared>();
  double total[1] = {};
  for (int64_t i = blockIdx.x; i < grams.n; i += gridDim.x) {
    const A *const student = grams.student + i * grams.n, *const teacher =
                                                              grams.teacher + i * grams.n;
    double squares[2] = {};
    for (int64_t j = threadIdx.x; j < grams.n; j += kThreads) {
      squares[0] += double(student[j]) * double(student[j]);
      squares[1] += double(teacher[j]) * double(teacher[j]);
    }
    block_sums(squares, shared.squares);
    const double norm = sqrt(squares[0]);
    const double inverse[2] = {inverse_of(norm), inverse_of(sqrt(squares[1]))};
    double sums[2] = {};
    for (int64_t j = threadIdx.x; j < grams.n; j += kThreads) {
      // Equal sides differ by 0.
      const double of_student = product(double(student[j]), inverse[0]);
      const double difference = of_student - product(double(teacher[j]), inverse[1]);
      sums[0] += difference * difference;
      sums[1] += difference * of_student;
    }
    block_sums(sums, shared.sums_of_row);
    if (threadIdx.x == 0) {
      total[0] += sums[0];
      // What is divided by a constant has a slope of its own alone.
      rows[i] = {{inverse[0], inverse[1]}, norm < kEps ? 0 : sums[1]};
    }
  }
  if (grid_sums(total, partial, tickets, shared.sums) && threadIdx.x == 0)
    loss.store(total[0] / (double(grams.n) * double(grams.n)));
}

constexpr int kTile = 32;

// One more column, so that both the rows and the columns of a tile lie in different banks.
struct Transposed {
  double slopes[2][kTile][kTile + 1];
};

// The slopes of a tile and of its mirror image, added to each other.
template <class A>
__global__ void __launch_bounds__(kThreads)
    similarity_slopes_kernel(Grams<A> grams, const Row* rows, A* slopes) {
  Transposed& shared = shared_memory<Transposed>();
  const TileOfPairs tile = tile_of_pairs(blockIdx.x);
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  constexpr int kAtOnce = kThreads / kTile;
  const double factor = 2 / (double(grams.n) * double(grams.n));
  const int64_t begin[2] = {tile.row * kTile, tile.column * kTile};
#pragma unroll
  for (int side = 0; side < 2; ++side)
    for (int k = y; k < kTile; k += kAtOnce) {
      const int64_t i = begin[side] + k, j = begin[1 - side] + x, at = i * grams.n + j;
      if (i >= grams.n || j >= grams.n) continue;
      const Row& row = rows[i];
      const double of_student = product(double(grams.student[at]), row.inverse[0]);
      const double difference = of_student - product(double(grams.teacher[at]), row.inverse[1]);
      shared.slopes[side][k][x] = factor * row.inverse[0] * (difference - of_student * row.inner);
    }
  __syncthreads();
#pragma unroll
  for (int side = 0; side < 2; ++side)
    for (int k = y; k < kTile; k += kAtOnce) {
      const int64_t i = begin[side] + k, j = begin[1 - side] + x;
      if (i < grams.n && j < grams.n)
        slopes[i * grams.n + j] = A(shared.slopes[side][k][x] + shared.slopes[1 - side][x][k]);
    }
}

template <class A>
void compare(const Tensor& student, const Tensor& teacher, const Tensor& loss, const Tensor& slopes,
             Scratch& scratch, const Stream& stream) {
  const Grams<A> grams{reinterpret_cast<const A*>(student.data),
                       reinterpret_cast<const A*>(teacher.data), student.sizes[0]};
  launch(similarity_rows_kernel<A>, {std::min(grams.n, kMostBlocks), kThreads, sizeof(Shared)},
         stream, grams, Loss(loss), scratch.rows(), scratch.partial,
         grid_counters.take(stream, reinterpret_cast<unsigned*>(&scratch.counter)));
  if (slopes)
    launch(similarity_slopes_kernel<A>,
           {tiles_of_pairs((grams.n + kTile - 1) / kTile), kThreads, sizeof(Transposed)}, stream,
           grams, scratch.rows(), reinterpret_cast<A*>(slopes.data));
}

}  // namespace

size_t similarity_scratch_bytes(int64_t rows) {
  return sizeof(Scratch) + size_t(rows) * sizeof(Row);
}

void similarity(const Place& place, const Tensor& student, const Tensor& teacher,
                const Tensor& loss, const Tensor& slopes, const Tensor& scratch) {
  const Stream stream(place);
  if (student.sizes[0] == 0) return clear(loss, stream);
  (loss.dtype == DType::f64 ? compare<double> : compare<float>)(student, teacher, loss, slopes,
                                                                *scratch.as<Scratch>(), stream);
}

}  // namespace fastkd::cuda
