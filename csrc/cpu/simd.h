// Vectors of the widest registers that this instruction set has, through the compiler's own vector
// types: one source for AVX-512, AVX2, SSE2, NEON and whatever comes later.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../tensor.h"

namespace fastkd::FASTKD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

template <class A>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int width = kVectorBytes / 4;
  typedef float vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t halves __attribute__((vector_size(kVectorBytes / 2)));
};

template <>
struct Simd<double> {
  static constexpr int width = kVectorBytes / 8;
  typedef double vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class A>
using vec_t = typename Simd<A>::vec;
template <class A>
using mask_t = typename Simd<A>::mask;
template <class A>
using bits_t = typename Simd<A>::bits;

template <class V>
using lane_t = std::decay_t<decltype(std::declval<V&>()[0])>;

template <class A>
inline vec_t<A> splat(A value) {
  return vec_t<A>{} + value;
}

// The larger one, and b where either is NaN.
template <class A>
inline vec_t<A> max(vec_t<A> a, vec_t<A> b) {
// One instruction, where GCC makes a comparison and a blend.
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float)) return (vec_t<A>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  if constexpr (__is_same(A, float)) return (vec_t<A>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <class A>
inline bits_t<A> sign_bits() {
  return bits_t<A>{} +
         (typename std::make_unsigned<lane_t<mask_t<A>>>::type(1) << (8 * sizeof(A) - 1));
}

template <class A>
inline vec_t<A> abs(vec_t<A> x) {
  return (vec_t<A>)((bits_t<A>)x & ~sign_bits<A>());
}

// The magnitude of `a` with the sign of `b`.
template <class A>
inline vec_t<A> copy_sign(vec_t<A> a, vec_t<A> b) {
  const bits_t<A> sign = sign_bits<A>();
  return (vec_t<A>)(((bits_t<A>)a & ~sign) | ((bits_t<A>)b & sign));
}

// The first n lanes of v, and 0 in the others.
template <class A>
inline vec_t<A> keep(vec_t<A> v, int n) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float))
    return (vec_t<A>)_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), (__m512)v);
#endif
  for (int i = n; i < Simd<A>::width; ++i) v[i] = 0;
  return v;
}

// Across the lanes: halves of a register are folded onto one another, in an order that is fixed.
template <class V, class F>
inline lane_t<V> fold(V v, const F& f) {
  if constexpr (sizeof(V) == sizeof(lane_t<V>) * 2) {
    return f(v[0], v[1]);
  } else {
    typedef lane_t<V> half_t __attribute__((vector_size(sizeof(V) / 2)));
    half_t parts[2];
    std::memcpy(parts, &v, sizeof v);
    return fold(half_t(f(parts[0], parts[1])), f);
  }
}

template <class A>
inline A sum(vec_t<A> v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}

template <class A>
inline A max_of(vec_t<A> v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Neighbouring lanes of two vectors, added.
template <class V, size_t... Lane>
inline V add_neighbours(V a, V b, std::index_sequence<Lane...>) {
  return __builtin_shufflevector(a, b, (2 * Lane)...) +
         __builtin_shufflevector(a, b, (2 * Lane + 1)...);
}

// The sum of each of as many vectors as they have lanes: fewer steps than one sum after another.
template <class A>
inline vec_t<A> sums(vec_t<A>* v) {
  constexpr int W = Simd<A>::width;
  for (int count = W / 2; count > 0; count /= 2)
    for (int i = 0; i < count; ++i)
      v[i] = add_neighbours(v[2 * i], v[2 * i + 1], std::make_index_sequence<W>{});
  return v[0];
}

inline vec_t<float> sqrt(vec_t<float> x) {
  for (int i = 0; i < Simd<float>::width; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
inline vec_t<double> sqrt(vec_t<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// exp(rate · x) for x <= 0, within 2 ulp where there is a fused multiply-add; 0 where float32 would
// leave its normal range. NaN stays NaN. rate · x · log2(e) is n + f: 2^f is a minimax polynomial,
// on [-1/2, 1/2] of degree 6. Where a register can be a table of 2^(k/16), n is a multiple of 1/16
// and degree 3 does.
template <class A>
struct Exp;

template <>
struct Exp<float> {
  explicit Exp(double rate) {
    const double binary = rate * 1.4426950408889634;
    high = float(binary);
    low = float(binary - double(high));
    least = -126 / binary < -3.4e38 ? -3.4e38f : float(-126 / binary);
  }

#if defined(__AVX512F__)
  vec_t<float> operator()(vec_t<float> x) const {
    const vec_t<float> table = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f,
                                1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                                1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
    const vec_t<float> shifter = splat<float>(786432.0f);  // 1.5 * 2^19: adding it rounds to 1/16
    const vec_t<float> shifted = x * high + shifter;
    const vec_t<float> n = shifted - shifter;
    const vec_t<float> f = x * low + (x * high - n);
    vec_t<float> y = splat<float>(5.5505085737e-02f);
    y = y * f + 2.4023355544e-01f;
    y = y * f + 6.9314718246e-01f;
    // The low four bits of `shifted` are k.
    const auto power = (vec_t<float>)_mm512_permutexvar_ps((__m512i)shifted, (__m512)table);
    y = y * f * power + power;
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_NLT_UQ);
    return (vec_t<float>)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)n);
  }
#else
  vec_t<float> operator()(vec_t<float> x) const {
    using bits = bits_t<float>;  // unsigned, because whatever a NaN or -1e30 leaves here may wrap
    const vec_t<float> shifter = splat<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds
    const vec_t<float> shifted = x * high + shifter;
    const vec_t<float> n = shifted - shifter;
    const vec_t<float> f = x * low + (x * high - n);
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
  }
#endif

  float high, low, least;
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

// log(x) of a positive number, as far as double goes, and NaN of NaN: without the branches of the C
// library's, so that the compiler can take several at once.
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
  return double(n) * 0.6931471805599453 + s * series + (x - x);
}

// Storage to arithmetic, one element.
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float widen(bfloat x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(half x) {
  // The exponent is moved to float32's by a multiplication, which subnormals survive.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const bool finite = magnitude < 0x0f800000u;
  const float y = finite ? float_of(magnitude) * 0x1p112f : float_of(magnitude | 0x7f800000u);
  return (x.bits & 0x8000) ? -y : y;
}

// Arithmetic to storage, rounded to nearest, ties to even.
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, float* to) { *to = float(x); }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, double* to) { *to = x; }
inline void narrow(float x, bfloat* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits =
      x != x ? uint16_t((bits >> 16) | 0x40) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, half* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  uint16_t out;
  if (bits > 0x7f800000u) {
    out = 0x7e00;
  } else if (bits >= 0x477ff000u) {  // rounds to 2^16 or beyond
    out = 0x7c00;
  } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 aligns the last bit with half's
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    out = uint16_t(bits - 0x3f000000u);
  } else {
    bits += 0xfff + ((bits >> 13) & 1);
    out = uint16_t((bits - 0x38000000u) >> 13);
  }
  to->bits = uint16_t(out | sign);
}
// A double rounds once, not to float32 first: to odd, the intermediate cannot cause a tie.
template <class Half>
inline void narrow(double x, Half* to) {
  float y = float(x);
  if (double(y) != x && x == x && std::fabs(x) < 3e38) {
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    const bool above = std::fabs(double(y)) > std::fabs(x);
    if (above) bits -= 1;
    bits |= 1;
    std::memcpy(&y, &bits, 4);
  }
  narrow(y, to);
}

// One vector from memory.
template <class A>
inline vec_t<A> load(const A* from) {
  vec_t<A> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class A>
inline vec_t<A> load(const bfloat* from) {
  if constexpr (sizeof(A) == 4) {
#if defined(__AVX512F__)  // one instruction, where GCC makes four of the conversion below
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return (vec_t<A>)_mm512_slli_epi32(wide, 16);
#endif
    typename Simd<float>::halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return (vec_t<float>)(__builtin_convertvector(bits, bits_t<float>) << 16);
  } else {
    vec_t<A> v;
    for (int i = 0; i < Simd<A>::width; ++i) v[i] = widen(from[i]);
    return v;
  }
}
template <class A>
inline vec_t<A> load(const half* from) {
  vec_t<A> v;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (vec_t<A>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
  if constexpr (sizeof(A) == 4)
    return (vec_t<A>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#endif
  for (int i = 0; i < Simd<A>::width; ++i) v[i] = widen(from[i]);
  return v;
}
template <class A, class S>
inline vec_t<A> load_as(const S* from) {
  if constexpr (sizeof(S) == 2 || sizeof(S) == sizeof(A)) {
    return load<A>(from);
  } else {
    vec_t<A> v;
    for (int i = 0; i < Simd<A>::width; ++i) v[i] = A(from[i]);
    return v;
  }
}

// One vector to memory.
template <class V, class S>
inline void store(V v, S* to) {
  using A = lane_t<V>;
  if constexpr (sizeof(S) == sizeof(A)) {
    std::memcpy(to, &v, sizeof v);
    return;
  }
  if constexpr (sizeof(A) == 4 && sizeof(S) == 2) {
    if constexpr (__is_same(S, bfloat)) {
      const auto bits = (bits_t<float>)v;
      const bits_t<float> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const bits_t<float> quiet = (bits >> 16) | 0x40u;
      const bits_t<float> chosen = v != v ? quiet : rounded;
#if defined(__AVX512F__)
      _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)chosen));
      return;
#endif
      const auto out = __builtin_convertvector(chosen, typename Simd<float>::halves);
      std::memcpy(to, &out, sizeof out);
      return;
    }
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
    return;
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
    return;
#endif
  }
  for (int i = 0; i < Simd<A>::width; ++i) narrow(v[i], to + i);
}

// A whole vector past the cache, for gradients that would not stay in it: memory is then written
// without being read first. `to` must be aligned to the store's size.
template <class V, class S>
inline void stream(V v, S* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_stream_ps(to, (__m512)v);
  if constexpr (sizeof(S) == 2) {
    __m256i lanes;
    store(v, (S*)&lanes);
    return _mm256_stream_si256((__m256i*)to, lanes);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return _mm256_stream_ps(to, (__m256)v);
  if constexpr (sizeof(S) == 2) {
    __m128i lanes;
    store(v, (S*)&lanes);
    return _mm_stream_si128((__m128i*)to, lanes);
  }
#endif
  store(v, to);
}

// Elements before `to` is aligned for `stream`; at most n.
template <class A, class S>
inline int until_aligned(const S* to, int n) {
  constexpr uintptr_t bytes = Simd<A>::width * sizeof(S);
  const uintptr_t past = reinterpret_cast<uintptr_t>(to) % bytes;
  const int elements = past == 0 ? 0 : int((bytes - past) / sizeof(S));
  return elements < n ? elements : n;
}

// The first n lanes of a vector from or to memory; `fill` in the others.
template <class A, class S>
inline vec_t<A> load_part(const S* from, int n, A fill) {
#if defined(__AVX512F__)
  if constexpr (__is_same(A, float) && sizeof(S) <= 4) {
    const auto first = __mmask16((1u << n) - 1);
    vec_t<A> v;
    if constexpr (sizeof(S) == 4) {
      v = (vec_t<A>)_mm512_maskz_loadu_ps(first, from);
    } else {
      const __m256i lanes = _mm256_maskz_loadu_epi16(first, from);
      v = load<A>((const S*)&lanes);
    }
    return (vec_t<A>)_mm512_mask_mov_ps((__m512)splat<A>(fill), first, (__m512)v);
  }
#endif
  vec_t<A> v = splat<A>(fill);
  for (int i = 0; i < n; ++i) v[i] = A(widen(from[i]));
  return v;
}
template <class V, class S>
inline void store_part(V v, S* to, int n) {
#if defined(__AVX512F__)
  if constexpr (__is_same(lane_t<V>, float) && sizeof(S) <= 4) {
    const auto first = __mmask16((1u << n) - 1);
    if constexpr (sizeof(S) == 4) {
      _mm512_mask_storeu_ps(to, first, (__m512)v);
    } else {
      __m256i lanes;
      store(v, (S*)&lanes);
      _mm256_mask_storeu_epi16(to, first, lanes);
    }
    return;
  }
#endif
  for (int i = 0; i < n; ++i) narrow(v[i], to + i);
}

// All lanes, or the first n: what `over_vectors` hands on.
template <class A>
using All = std::integral_constant<int, Simd<A>::width>;

template <class A, class S>
inline vec_t<A> load_lanes(const S* from, All<A>, A) {
  return load_as<A>(from);
}
template <class A, class S>
inline vec_t<A> load_lanes(const S* from, int n, A fill) {
  return load_part<A>(from, n, fill);
}
template <class A, class S>
inline void store_lanes(vec_t<A> v, S* to, All<A>) {
  store(v, to);
}
template <class A, class S>
inline void store_lanes(vec_t<A> v, S* to, int n) {
  store_part(v, to, n);
}
template <class A>
inline vec_t<A> keep(vec_t<A> v, All<A>) {
  return v;
}

// f(i, lanes) for the vectors of n elements, the last one perhaps in part.
template <class A, class I, class F>
inline void over_vectors(I n, const F& f) {
  I i = 0;
  for (; i + All<A>::value <= n; i += All<A>::value) f(i, All<A>{});
  if (i < n) f(i, int(n - i));
}

// Calls `f` with a null pointer of the storage type that `dtype` names.
template <class F>
inline auto with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16:
      return f((half*)nullptr);
    case DType::bf16:
      return f((bfloat*)nullptr);
    case DType::f64:
      return f((double*)nullptr);
    default:
      return f((float*)nullptr);
  }
}

}  // namespace fastkd::FASTKD_ISA
