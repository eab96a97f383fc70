// CUDA's keywords, vector types and built-in variables.
#pragma once

// The standard library comes first: what follows takes names that it may use inside.
#include <math.h>  // kernels call exp and isnan without std::, of floats too

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

// __shared__ is left out: a variable of the block would be a variable of the process.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define CUDA_ON_HOST_VECTORS(T, name, align)                         \
  struct alignas(sizeof(T)) name##1 { T x; };                        \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                 \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align) name##4 { T x, y, z, w; };                   \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_HOST_VECTORS(unsigned char, uchar, 4)
CUDA_ON_HOST_VECTORS(unsigned short, ushort, 8)
CUDA_ON_HOST_VECTORS(int, int, 16)
CUDA_ON_HOST_VECTORS(unsigned, uint, 16)
CUDA_ON_HOST_VECTORS(long long, longlong, 16)
CUDA_ON_HOST_VECTORS(unsigned long long, ulonglong, 16)
CUDA_ON_HOST_VECTORS(float, float, 16)
CUDA_ON_HOST_VECTORS(double, double, 16)
#undef CUDA_ON_HOST_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Of the thread that runs; the scheduler sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
