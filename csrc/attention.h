// What attention maps and attention transfer are computed with, the same on every device.
#pragma once

#include <tuple>

#include "fields.h"
#include "reduction.h"

namespace fastkd {

// A sum is one of powers, whose exponent is 1.
enum class MapKind { sum, sum_pow, max_pow };
constexpr std::array<const char*, 3> names_of(MapKind) { return {"sum", "sum_pow", "max_pow"}; }

enum class Distance { norm, mse };
constexpr std::array<const char*, 2> names_of(Distance) { return {"norm", "mse"}; }

// Those of a map of max_pow; other kinds have none.
inline int32_t* argmax_of(const Tensors& argmax, size_t i) {
  return i < argmax.size() ? argmax[i].as<int32_t>() : nullptr;
}

struct MapParameters {
  MapKind kind;
  double p;
  double eps;
  int channel_dim;  // counted from the end where negative

  static constexpr auto fields() {
    return std::make_tuple(field("kind", &MapParameters::kind), field("p", &MapParameters::p),
                           field("eps", &MapParameters::eps),
                           field("channel_dim", &MapParameters::channel_dim));
  }
};

struct TransferParameters {
  Distance distance;
  double order;
  double beta;
  Reduction reduction;

  static constexpr auto fields() {
    return std::make_tuple(field("distance", &TransferParameters::distance),
                           field("order", &TransferParameters::order),
                           field("beta", &TransferParameters::beta),
                           field("reduction", &TransferParameters::reduction));
  }

  // Of a sample in the loss.
  double sample_scale(int64_t batch) const {
    return reduction == Reduction::mean && batch > 0 ? 1 / double(batch) : 1;
  }
};

}  // namespace fastkd
