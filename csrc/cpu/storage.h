// Vectors to and from memory: every storage type, whole vectors and parts of them.
#pragma once

#include "../tensor.h"
#include "simd.h"

namespace fastkd::FASTKD_ISA {

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

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

// The bytes that a vector of A takes as S, where one store past the cache writes as many; else 0.
template <class A, class S>
constexpr int streamed_bytes() {
  [[maybe_unused]] constexpr int bytes = Simd<A>::width * int(sizeof(S));
#if defined(__AVX2__)
  if (bytes == 16 || bytes == 32 || bytes == kVectorBytes) return bytes;
#endif
  return 0;
}

// A whole vector past the cache, for gradients that would not stay in it: memory is then written
// without being read first. `to` must be aligned to `streamed_bytes`. Where that is 0 it is stored.
template <class V, class S>
inline void stream(V v, S* to) {
  [[maybe_unused]] constexpr int bytes = streamed_bytes<lane_t<V>, S>();
#if defined(__AVX512F__)
  if constexpr (bytes == 64) {
    __m512i lanes;
    store(v, (S*)&lanes);
    return _mm512_stream_si512((__m512i*)to, lanes);
  }
#endif
#if defined(__AVX2__)
  if constexpr (bytes == 32) {
    __m256i lanes;
    store(v, (S*)&lanes);
    return _mm256_stream_si256((__m256i*)to, lanes);
  }
  if constexpr (bytes == 16) {
    __m128i lanes;
    store(v, (S*)&lanes);
    return _mm_stream_si128((__m128i*)to, lanes);
  }
#endif
  store(v, to);
}

// Elements before `to`, which is aligned to its type, is aligned for `stream`; at most n.
template <class A, class S>
inline int until_aligned(const S* to, int n) {
  constexpr uintptr_t bytes = streamed_bytes<A, S>();
  if constexpr (bytes == 0) {
    return 0;
  } else {
    const uintptr_t past = reinterpret_cast<uintptr_t>(to) % bytes;
    const int elements = past == 0 ? 0 : int((bytes - past) / sizeof(S));
    return elements < n ? elements : n;
  }
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

// How many numbers a lane adds up one after another. Each addition rounds to the digits of the sum
// so far, and one class may make that as large as it will ever be: n numbers have up to n such
// errors, and sums of kAddedUp of them kAddedUp + n / kAddedUp.
constexpr int kAddedUp = 32;

// f(first, size) for pieces of n elements, of which a lane has kAddedUp.
template <class A, class F>
inline void over_pieces(int n, const F& f) {
  constexpr int most = kAddedUp * All<A>::value;
  for (int first = 0; first < n; first += most) f(first, n - first < most ? n - first : most);
}

// Writes n elements, f(i, lanes) being the vector that begins at i; past the cache if
// `non_temporal`, from the first element that may begin a vector there. f is called in order.
template <class A, class S, class I, class F>
inline void write_vectors(S* to, I n, bool non_temporal, const F& f) {
  constexpr int W = All<A>::value;
  I first = 0;
  if (non_temporal) {
    const int head = until_aligned<A>(to, int(n < W ? n : W));
    if (head > 0) store_part(f(I(0), head), to, head);
    first = head;
  }
  over_vectors<A>(n - first, [&](I i, auto lanes) {
    const auto v = f(first + i, lanes);
    if (non_temporal && lanes == W)
      stream(v, to + first + i);
    else
      store_lanes<A>(v, to + first + i, lanes);
  });
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
