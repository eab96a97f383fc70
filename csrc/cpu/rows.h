// Logits as rows: every index but the class's, in C order, with neighbouring dimensions merged
// where the strides of all tensors allow it.
#pragma once

#include "memory.h"
#include "thresholds.h"

namespace fastkd::FASTKD_ISA {

template <int Tensors>
struct Rows {
  int64_t count = 1;
  int64_t classes = 1;
  int ndim = 0;
  int64_t sizes[kMaxDims];
  int64_t strides[Tensors][kMaxDims];
  int64_t class_stride[Tensors];

  Rows(const Tensor* const (&tensors)[Tensors], int dim) {
    classes = tensors[0]->sizes[dim];
    for (int t = 0; t < Tensors; ++t) class_stride[t] = tensors[t]->strides[dim];
    for (int d = 0; d < tensors[0]->ndim; ++d) {
      if (d == dim || tensors[0]->sizes[d] == 1) continue;
      const int64_t size = tensors[0]->sizes[d];
      count *= size;
      bool merges = ndim > 0;
      for (int t = 0; t < Tensors && merges; ++t)
        merges = strides[t][ndim - 1] == tensors[t]->strides[d] * size;
      if (merges) {
        sizes[ndim - 1] *= size;
      } else {
        sizes[ndim++] = size;
      }
      for (int t = 0; t < Tensors; ++t) strides[t][ndim - 1] = tensors[t]->strides[d];
    }
  }

  void offsets(int64_t row, int64_t (&out)[Tensors]) const {
    for (int t = 0; t < Tensors; ++t) out[t] = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t index = d == 0 ? row : row % sizes[d];
      row = d == 0 ? 0 : row / sizes[d];
      for (int t = 0; t < Tensors; ++t) out[t] += index * strides[t][d];
    }
  }

  // Rows that lie side by side in every tensor, while their classes do not.
  int64_t columns() const {
    if (ndim == 0 || sizes[ndim - 1] < thresholds.column_rows) return 0;
    for (int t = 0; t < Tensors; ++t)
      if (strides[t][ndim - 1] != 1 || class_stride[t] == 1) return 0;
    return sizes[ndim - 1];
  }
};

}  // namespace fastkd::FASTKD_ISA
