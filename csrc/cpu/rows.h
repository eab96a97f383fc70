// Logits as rows: every index but the class's, in C order, with neighbouring dimensions merged
// where the strides of all tensors allow it.
#pragma once

#include <vector>

#include "memory.h"
#include "thresholds.h"

namespace fastkd::FASTKD_ISA {

// One tensor of those that have the same rows.
struct Side {
  Side() {}  // what is not used of the strides is not zeroed

  const Tensor* tensor;
  int64_t class_stride;
  int64_t strides[kMaxDims];  // of the rows' dimensions
};

struct Rows {
  int64_t count = 1;
  int64_t classes;
  int ndim = 0;
  int64_t sizes[kMaxDims];
  std::vector<Side> sides;

  Rows(const std::vector<const Tensor*>& tensors, int dim) : sides(tensors.size()) {
    const Tensor& first = *tensors[0];
    classes = first.sizes[dim];
    for (size_t t = 0; t < sides.size(); ++t) {
      sides[t].tensor = tensors[t];
      sides[t].class_stride = tensors[t]->strides[dim];
    }
    for (int d = 0; d < first.ndim; ++d) {
      if (d == dim || first.sizes[d] == 1) continue;
      const int64_t size = first.sizes[d];
      count *= size;
      bool merges = ndim > 0;
      for (const Side& side : sides)
        merges = merges && side.strides[ndim - 1] == side.tensor->strides[d] * size;
      if (merges) {
        sizes[ndim - 1] *= size;
      } else {
        sizes[ndim++] = size;
      }
      for (Side& side : sides) side.strides[ndim - 1] = side.tensor->strides[d];
    }
  }

  int64_t offset(const Side& side, int64_t row) const {
    int64_t at = 0;
    for (int d = ndim - 1; d > 0; --d) {
      at += row % sizes[d] * side.strides[d];
      row /= sizes[d];
    }
    return ndim == 0 ? 0 : at + row * side.strides[0];
  }

  // How many rows are contiguous in every tensor, while their classes are not; or 0.
  int64_t columns() const {
    if (ndim == 0 || sizes[ndim - 1] < thresholds.column_rows) return 0;
    for (const Side& side : sides)
      if (side.strides[ndim - 1] != 1 || side.class_stride == 1) return 0;
    return sizes[ndim - 1];
  }
};

}  // namespace fastkd::FASTKD_ISA
