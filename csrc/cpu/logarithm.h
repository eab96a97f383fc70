// Logarithms of vectors of normal positive numbers.
#pragma once

#include "exponential.h"

namespace fastkd::FASTKD_ISA {

// Within 1 ulp. x = 2^n · m with m between √½ and √2, whose
// logarithm is a minimax polynomial in m − 1 (Cephes' of degree 8, after the first two terms of the
// series). Multiples of the first part of log 2 are exact. `less_1(n, m − 1)` may have that
// difference better.
template <class F>
inline vec_t<float> log_with(vec_t<float> x, const F& less_1) {
  using whole = mask_t<float>;
  const whole bits = (whole)x - 0x3f3504f3, n = bits >> 23;
  const vec_t<float> f = less_1(n, (vec_t<float>)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f),
                     z = f * f;
  const vec_t<float> exponent = __builtin_convertvector(n, vec_t<float>);
  vec_t<float> y = splat<float>(7.0376836292e-02f);
  y = y * f - 1.1514610310e-01f;
  y = y * f + 1.1676998740e-01f;
  y = y * f - 1.2420140846e-01f;
  y = y * f + 1.4249322787e-01f;
  y = y * f - 1.6668057665e-01f;
  y = y * f + 2.0000714765e-01f;
  y = y * f - 2.4999993993e-01f;
  y = y * f + 3.3333331174e-01f;
  y = y * f * z - exponent * 2.12194440e-4f;
  return exponent * 0.693359375f + (f + (y - 0.5f * z));
}

inline vec_t<float> log(vec_t<float> x) {
  return log_with(x, [](auto, vec_t<float> f) { return f; });
}

// log(x) of an x that is 1 + more: near 1 the latter has the digits. Finite also of 0.
inline vec_t<float> log_of(vec_t<float> x, vec_t<float> more) {
  return log_with(x, [=](auto n, vec_t<float> f) { return n == 0 ? more : f; });
}

// float64 inputs are for checking other dtypes: exact before fast.
inline vec_t<double> log(vec_t<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::log(x[i]);
  return x;
}
inline vec_t<double> log_of(vec_t<double> x, vec_t<double> more) {
  for (int i = 0; i < Simd<double>::width; ++i)
    x[i] = std::abs(more[i]) < 0.5 ? std::log1p(more[i]) : x[i] > 0 ? std::log(x[i]) : 0;
  return x;
}

}  // namespace fastkd::FASTKD_ISA
