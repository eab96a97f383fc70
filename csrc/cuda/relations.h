// What losses on matrices of pairs have in common: tiles of pairs, and a loss.
#pragma once

#include "reduce.h"
#include "storage.h"

namespace fastkd::cuda {

struct TileOfPairs {
  int64_t row;
  int64_t column;
};

// So many square tiles lie on and above the diagonal of a matrix of so many tiles each way.
constexpr int64_t tiles_of_pairs(int64_t along) { return along * (along + 1) / 2; }

// Where one of them lies; they are numbered column by column.
__device__ __forceinline__ TileOfPairs tile_of_pairs(int64_t number) {
  int64_t column = int64_t((sqrt(8 * double(number) + 1) - 1) / 2);
  // The root is rounded.
  while (tiles_of_pairs(column) > number) --column;
  while (tiles_of_pairs(column + 1) <= number) ++column;
  return {number - tiles_of_pairs(column), column};
}

// A loss, which is one number of either dtype.
struct Loss {
  char* data;
  DType dtype;
  explicit Loss(const Tensor& loss) : data(loss.data), dtype(loss.dtype) {}
  __device__ void store(double x) const { Elements<Any>(data, dtype, 0).store(0, x); }
};

// That of an empty batch.
inline void clear(const Tensor& loss, const Stream& stream) {
  check(cudaMemsetAsync(loss.data, 0, size_t(size_of(loss.dtype)), stream.handle),
        "clearing the loss");
}

}  // namespace fastkd::cuda
