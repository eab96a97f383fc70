// Exponentials and logarithms of vectors.
#pragma once

#include "simd.h"

namespace fastkd::FASTKD_ISA {

// exp(rate · x) for x <= 0, within 2 ulp where there is a fused multiply-add; 0 where float32 would
// leave its normal range. NaN stays NaN. rate · x · log2(e) is n + f: 2^f is a minimax polynomial,
// on [-1/2, 1/2] of degree 6. Where two registers can be a table of 2^(k/32), n is a multiple of
// 1/32 and degree 2 does.
//
// `rate` is the nearest that one multiplication can apply, within 2^-24 of what was asked for. A
// softmax at a temperature that near is as good, if all that goes with it takes the same rate.
template <class A>
struct Exp;

template <>
struct Exp<float> {
  explicit Exp(double wanted)
      : binary(float(wanted * kBinary < kMost ? wanted * kBinary : kMost)),
        least(-126 / (wanted * kBinary) < -kMost ? -float(kMost)
                                                 : float(-126 / (wanted * kBinary))),
        rate(binary < float(kMost) ? double(binary) / kBinary : wanted) {}

  vec_t<float> operator()(vec_t<float> x) const {
    const vec_t<float> shifter = splat<float>(kShifter);
    const vec_t<float> shifted = x * binary + shifter;
    const vec_t<float> n = shifted - shifter;
    const vec_t<float> f = x * binary - n;
#if defined(__AVX512F__)
    const vec_t<float> low = {1.0f,        1.0218972f,  1.04427373f, 1.06714046f,
                              1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
                              1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f,
                              1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f};
    const vec_t<float> high = {1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f,
                               1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
                               1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f,
                               1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
    vec_t<float> y = splat<float>(2.4022676051e-01f);
    y = y * f + 6.9315731525e-01f;
    // The low five bits of `shifted` are k.
    const auto power =
        (vec_t<float>)_mm512_permutex2var_ps((__m512)low, (__m512i)shifted, (__m512)high);
    y = y * f * power + power;
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLT_UQ);
    return (vec_t<float>)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)n);
#else
    using bits = bits_t<float>;  // unsigned, because whatever a NaN or -1e30 leaves here may wrap
    vec_t<float> y = splat<float>(1.5353361960e-04f);
    y = y * f + 1.3398875017e-03f;
    y = y * f + 9.6184369177e-03f;
    y = y * f + 5.5503323674e-02f;
    y = y * f + 2.4022647738e-01f;
    y = y * f + 6.9314718246e-01f;
    y = y * f + 1.0f;
    // The low bits of `shifted` are n; at the exponent's place they are 2^n.
    const bits power = ((bits)shifted << 23) + 0x3f800000u;
    return x < least ? vec_t<float>{} : y * (vec_t<float>)power;
#endif
  }

#if defined(__AVX512F__)
  static constexpr float kShifter = 393216.0f;  // 1.5 * 2^18: adding it rounds to 1/32
#else
  static constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds
#endif
  static constexpr double kBinary = 1.4426950408889634;  // log2(e)
  // Where the largest logit alone counts, 0 · inf would be NaN.
  static constexpr double kMost = 3.4e38;
  float binary, least;
  double rate;
};

// float64 inputs are for checking other dtypes: exact before fast.
template <>
struct Exp<double> {
  explicit Exp(double rate) : rate(rate) {}
  vec_t<double> operator()(vec_t<double> x) const {
    for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::exp(x[i] * rate);
    return x;
  }
  double rate;
};

// log(x) of 0 and of positive numbers, as far as double goes, and NaN of NaN: without the branches
// of the C library's, so that the compiler can take several at once.
inline double log_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  // x = 2^n · m with m between √½ and √2, whose logarithm is a series in (m − 1) / (m + 1).
  const int64_t n = int64_t(bits - 0x3fe6a09e667f3bcdu) >> 52;
  bits -= uint64_t(n) << 52;
  double m;
  std::memcpy(&m, &bits, 8);
  const double s = (m - 1) / (m + 1), z = s * s;
  double series = 2.0 / 19;
  for (int power = 17; power > 0; power -= 2) series = series * z + 2.0 / power;
  return double(n) * 0.6931471805599453 + s * series + (x == 0 ? -INFINITY : x - x);
}

}  // namespace fastkd::FASTKD_ISA
