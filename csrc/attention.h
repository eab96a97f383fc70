// What attention maps and attention transfer are computed with, the same on every device.
#pragma once

#include "reduction.h"

namespace fastkd {

enum class MapKind : int { sum_pow = 0, max_pow = 1 };
enum class Distance : int { norm = 0, mse = 1 };

struct MapParameters {
  MapKind kind;
  double p;
  double eps;
  int channel_dim;  // counted from the end where negative
  int threads;
};

struct TransferParameters {
  Distance distance;
  double order;
  double beta;
  Reduction reduction;

  // Of a sample in the loss.
  double sample_scale(int64_t batch) const {
    return reduction == Reduction::mean && batch > 0 ? 1 / double(batch) : 1;
  }
};

}  // namespace fastkd
