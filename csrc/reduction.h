// How the losses of samples become one.
#pragma once

#include <array>

#include "tensor.h"

namespace fastkd {

enum class Reduction { none, sum, mean, batchmean };

// What Python calls them, in turn.
constexpr std::array<const char*, 4> names_of(Reduction) {
  return {"none", "sum", "mean", "batchmean"};
}

// What the sum over all elements of a pair of features is divided by.
inline double divisor_of(const Tensor& features, Reduction reduction) {
  const double all = double(features.numel()), batch = double(features.sizes[0]);
  const double divisor = reduction == Reduction::mean        ? all
                         : reduction == Reduction::batchmean ? batch
                                                             : 1;
  return divisor > 0 ? divisor : 1;
}

}  // namespace fastkd
