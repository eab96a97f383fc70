// Half precision: the type and its conversions, bit for bit as the chip has them.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

struct alignas(2) __half {
  __half() = default;
  __half(const __half_raw& raw) : bits_(raw.x) {}
  operator __half_raw() const { return {bits_}; }

 private:
  unsigned short bits_;
};
using half = __half;

inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline unsigned short __half_as_ushort(__half h) { return __half_raw(h).x; }

inline float __half2float(__half h) {
  const unsigned bits = __half_as_ushort(h);
  const unsigned sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(fraction ? 0x7fffffff : sign | 0x7f800000);
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * float(fraction);
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  unsigned bits = __float_as_uint(x) & 0x7fffffff;
  if (bits > 0x7f800000) return __ushort_as_half(0x7fff);
  if (bits >= 0x47800000) {  // 65536; what is a little less rounds to infinity below
    bits = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: beside 0.5 a float's last place is worth as much
    bits = __float_as_uint(__uint_as_float(bits) + 0.5f) - __float_as_uint(0.5f);
  } else {
    bits = (bits + 0xfff + (bits >> 13 & 1) - (112 << 23)) >> 13;
  }
  return __ushort_as_half(static_cast<unsigned short>(sign | bits));
}
inline __half __float2half(float x) { return __float2half_rn(x); }
