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

namespace fastkd::FASTKD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

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

// f of the neighbouring lanes of two vectors.
template <class V, class F, size_t... Lane>
inline V fold_neighbours(V a, V b, const F& f, std::index_sequence<Lane...>) {
  return f(V(__builtin_shufflevector(a, b, (2 * Lane)...)),
           V(__builtin_shufflevector(a, b, (2 * Lane + 1)...)));
}

// Across each of as many vectors as they have lanes: fewer steps than one after another.
template <class A, class F>
inline vec_t<A> fold_each(vec_t<A>* v, const F& f) {
  constexpr int W = Simd<A>::width;
  for (int count = W / 2; count > 0; count /= 2)
    for (int i = 0; i < count; ++i)
      v[i] = fold_neighbours(v[2 * i], v[2 * i + 1], f, std::make_index_sequence<W>{});
  return v[0];
}

template <class A>
inline vec_t<A> sums(vec_t<A>* v) {
  return fold_each<A>(v, [](auto a, auto b) { return a + b; });
}

template <class A>
inline vec_t<A> maxima(vec_t<A>* v) {
  return fold_each<A>(v, [](auto a, auto b) { return max<A>(a, b); });
}

inline vec_t<float> sqrt(vec_t<float> x) {
  for (int i = 0; i < Simd<float>::width; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
inline vec_t<double> sqrt(vec_t<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

}  // namespace fastkd::FASTKD_ISA
