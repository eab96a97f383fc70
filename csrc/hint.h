// What hints are computed with, the same on every device.
#pragma once

#include <tuple>

#include "fields.h"
#include "reduction.h"

namespace fastkd {

struct HintParameters {
  double scale;  // of the squares: a half, or 1
  Reduction reduction;

  static constexpr auto fields() {
    return std::make_tuple(field("scale", &HintParameters::scale),
                           field("reduction", &HintParameters::reduction));
  }
};

}  // namespace fastkd
