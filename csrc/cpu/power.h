// |x|^p and its derivative, for vectors. Multiples of a half up to 4 are products and square roots;
// other exponents go through the C library, a lane at a time.
#pragma once

#include "simd.h"

namespace fastkd::FASTKD_ISA {

// The exponent, or `halves` = 2p where that is known when the kernel is compiled; otherwise 0.
template <class A, int halves>
struct Power {
  explicit Power(double p) : p_(A(p)), halves_(2 * p == int(2 * p) && p <= 4 ? int(2 * p) : -1) {}

  // |x|^p
  vec_t<A> operator()(vec_t<A> x) const {
    const auto a = abs<A>(x);
    if constexpr (halves == 2) return a;
    if constexpr (halves == 4) return x * x;
    return raise(a, halves_, p_);
  }

  // p · |x|^(p−1) · sign(x), and 0 at 0
  vec_t<A> derivative(vec_t<A> x) const {
    if constexpr (halves == 4) return x + x;
    const auto zero = vec_t<A>{};
    auto magnitude = splat<A>(1);
    if constexpr (halves != 2) magnitude = raise(abs<A>(x), halves_ - 2, p_ - 1) * p_;
    return x == zero ? zero : x == x ? copy_sign<A>(magnitude, x) : x;
  }

 private:
  // Not to 0 and 1, which only p of 1 and 2 would need: they have forms of their own above.
  static vec_t<A> raise(vec_t<A> a, int halves_of, A exponent) {
    switch (halves_of) {
      case 1:
        return sqrt(a);
      case 3:
        return a * sqrt(a);
      case 4:
        return a * a;
      case 5:
        return a * a * sqrt(a);
      case 6:
        return a * a * a;
      case 7:
        return a * a * a * sqrt(a);
      case 8:
        return (a * a) * (a * a);
      default:
        for (int i = 0; i < Simd<A>::width; ++i) a[i] = std::pow(a[i], exponent);
        return a;
    }
  }

  A p_;
  int halves_;
};

}  // namespace fastkd::FASTKD_ISA
