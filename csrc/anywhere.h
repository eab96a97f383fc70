// Functions that the CPU's kernels and the GPU's have in common. They are always inlined: compiled
// once for each instruction set, they must not be merged by the linker.
#pragma once

#ifdef __CUDACC__
#define FASTKD_ANYWHERE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FASTKD_ANYWHERE __forceinline
#else
#define FASTKD_ANYWHERE inline __attribute__((always_inline))
#endif
