// Logits that were capped: z = c tanh(x / c).
#pragma once

#include "anywhere.h"

namespace fastkd {

template <class A>
struct Softcap {
  A cap, inverse;

  FASTKD_ANYWHERE explicit Softcap(double cap) : cap(A(cap)), inverse(A(1 / cap)) {}

  // dz/dx = 1 − (z/c)², as a product: beside c the difference is exact, and a square is not. 0 also
  // of a z that was rounded beyond c, and of NaN, so that a gradient that is switched off stays 0.
  template <class V>
  FASTKD_ANYWHERE V slope(V z) const {
    const V found = (cap - z) * inverse * ((cap + z) * inverse);
    return found > 0 ? found : V{};
  }
};

}  // namespace fastkd
