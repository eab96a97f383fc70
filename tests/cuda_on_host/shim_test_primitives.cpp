// Warp primitives, atomics, the built-in variables and the numbers of 16 bits.
#include <algorithm>
#include <array>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "shim_test.h"

namespace {

template <class T>
__global__ void shuffle_kernel(const T* values, T* got, char kind, unsigned mask, int argument,
                               int width) {
  const unsigned lane = threadIdx.x;
  got[lane] = values[lane];
  if (!(mask >> lane & 1)) return __syncwarp(~mask);
  if (kind == 'i') got[lane] = __shfl_sync(mask, values[lane], argument, width);
  if (kind == 'u') got[lane] = __shfl_up_sync(mask, values[lane], unsigned(argument), width);
  if (kind == 'd') got[lane] = __shfl_down_sync(mask, values[lane], unsigned(argument), width);
  if (kind == 'x') got[lane] = __shfl_xor_sync(mask, values[lane], argument, width);
}

template <class T>
Array<T> shuffle(Array<T> values, char kind, unsigned mask, int argument, int width) {
  Array<T> got(32);
  Launch{1, 32}(shuffle_kernel<T>, values.data(), got.mutable_data(), kind, mask, argument, width);
  return got;
}

__global__ void votes_kernel(unsigned predicates, unsigned mask, unsigned* got) {
  const unsigned lane = threadIdx.x, own = mask >> lane & 1 ? mask : ~mask;
  const int predicate = predicates >> lane & 1;
  got[lane] = __ballot_sync(own, predicate);
  got[32 + lane] = unsigned(__any_sync(own, predicate));
  got[64 + lane] = unsigned(__all_sync(own, predicate));
  got[96 + lane] = unsigned(__syncthreads_count(predicate));
  got[128 + lane] = unsigned(__syncthreads_or(predicate));
  got[160 + lane] = unsigned(__syncthreads_and(predicate));
}

Array<unsigned> votes(unsigned predicates, unsigned mask) {
  Array<unsigned> got({6, 32});
  Launch{1, 32}(votes_kernel, predicates, mask, got.mutable_data());
  return got;
}

struct Atomics {
  unsigned sum, greatest, least, tickets;
  unsigned long long long_sum, exchanged, swapped;
  int greatest_int;
};

__global__ void atomics_kernel(Atomics* all) {
  const unsigned i = thread_of_grid();
  atomicAdd(&all->sum, i);
  atomicMax(&all->greatest, i);
  atomicMin(&all->least, i);
  atomicMax(&all->greatest_int, int(i) - 100);
  atomicInc(&all->tickets, 9);
  atomicAdd(&all->long_sum, 1ull << 40);
  atomicExch(&all->exchanged, 7);
  for (unsigned long long seen = 0, before;
       (before = atomicCAS(&all->swapped, seen, seen + 1)) != seen;)
    seen = before;
}

py::dict atomics(int blocks, int threads) {
  Atomics all{0, 0, ~0u, 0, 0, 0, 0, -1000};
  Launch{unsigned(blocks), unsigned(threads)}(atomics_kernel, &all);
  return py::dict(py::arg("sum") = all.sum, py::arg("greatest") = all.greatest,
                  py::arg("least") = all.least, py::arg("tickets") = all.tickets,
                  py::arg("long_sum") = all.long_sum, py::arg("exchanged") = all.exchanged,
                  py::arg("swapped") = all.swapped, py::arg("greatest_int") = all.greatest_int);
}

__global__ void places_kernel(unsigned* counts) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  ++counts[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

Array<unsigned> places(std::array<unsigned, 3> grid, std::array<unsigned, 3> block) {
  Launch launch{1, 1};
  launch.grid = dim3(grid[0], grid[1], grid[2]);
  launch.block = dim3(block[0], block[1], block[2]);
  Array<unsigned> counts(grid[0] * grid[1] * grid[2] * block[0] * block[1] * block[2]);
  std::fill_n(counts.mutable_data(), counts.size(), 0);
  launch(places_kernel, counts.mutable_data());
  return counts;
}

constexpr int kFunctions = 9;

template <class T>
__global__ void numbers_kernel(const T* values, T* got) {
  static_assert(std::is_same_v<decltype(exp(T()) + exp2(T()) + log(T()) + log2(T())), T>);
  const T x = values[threadIdx.x];
  const T all[kFunctions] = {exp(x),        exp2(x),         log(x),   log2(x), fmax(x, T(1)),
                             fmin(x, T(1)), fma(x, x, T(1)), rsqrt(x), abs(x)};
  T* mine = got + threadIdx.x * (kFunctions + 2);
  for (int i = 0; i < kFunctions; ++i) mine[i] = all[i];
  mine[kFunctions] = isfinite(x);
  mine[kFunctions + 1] = isnan(x);
}

template <class T>
Array<T> numbers(Array<T> values) {
  Array<T> got({int(values.size()), kFunctions + 2});
  Launch{1, unsigned(values.size())}(numbers_kernel<T>, values.data(), got.mutable_data());
  return got;
}

constexpr int kFloatPairs = 17;

// What only a float has, beside what it shares with a double.
__global__ void float_pairs_kernel(const float* values, float* got) {
  const float x = values[threadIdx.x];
  const float pairs[kFloatPairs][2] = {
      {expf(x), exp(x)},
      {__expf(x), exp(x)},
      {exp2f(x), exp2(x)},
      {logf(x), log(x)},
      {__logf(x), log(x)},
      {log2f(x), log2(x)},
      {__log2f(x), log2(x)},
      {fmaxf(x, 1), fmax(x, 1.0f)},
      {fminf(x, 1), fmin(x, 1.0f)},
      {fmaf(x, x, 1), fma(x, x, 1.0f)},
      {__fmaf_rn(x, x, 1), fma(x, x, 1.0f)},
      {rsqrtf(x), rsqrt(x)},
      {fabsf(x), abs(x)},
      {__fmul_rn(x, 3) - x, float(double(x) * 3) - x},
      {__frcp_rn(x), 1 / x},
      {__int2float_rn(0x1000003), 0x1000004},
      {__uint2float_rn(0xffffffff), 0x1p32f},
  };
  float* mine = got + threadIdx.x * kFloatPairs * 2;
  for (const auto& pair : pairs) {
    *mine++ = pair[0];
    *mine++ = pair[1];
  }
}

Array<float> float_pairs(Array<float> values) {
  Array<float> got({int(values.size()), kFloatPairs, 2});
  Launch{1, unsigned(values.size())}(float_pairs_kernel, values.data(), got.mutable_data());
  return got;
}

// Each access with a hint, of 16 bytes.
__global__ void hints_kernel(const float4* floats, const uint4* words, float4* floats_got,
                             uint4* words_got) {
  const unsigned i = threadIdx.x;
  const float4 a = i % 2 ? __ldcs(floats + i) : __ldcg(floats + i);
  const uint4 b = i % 2 ? __ldcs(words + i) : __ldg(words + i);
  __stcs(floats_got + i, make_float4(a.w, a.z, a.y, a.x));
  i % 2 ? __stcs(words_got + i, make_uint4(b.w, b.z, b.y, b.x))
        : __stcg(words_got + i, make_uint4(b.w, b.z, b.y, b.x));
}

py::tuple hints(Array<float> floats, Array<unsigned> words) {
  Array<float> floats_got({floats.shape(0), floats.shape(1)});
  Array<unsigned> words_got({words.shape(0), words.shape(1)});
  Launch{1, unsigned(floats.shape(0))}(hints_kernel, reinterpret_cast<const float4*>(floats.data()),
                                       reinterpret_cast<const uint4*>(words.data()),
                                       reinterpret_cast<float4*>(floats_got.mutable_data()),
                                       reinterpret_cast<uint4*>(words_got.mutable_data()));
  return py::make_tuple(floats_got, words_got);
}

template <class To, class From, class F>
Array<To> map(const Array<From>& from, const F& f) {
  Array<To> to(from.size());
  for (py::ssize_t i = 0; i < from.size(); ++i) to.mutable_data()[i] = f(from.data()[i]);
  return to;
}

}  // namespace

void define_primitives(py::module_& m) {
  m.def("shuffle_int", &shuffle<int>);
  m.def("shuffle_float", &shuffle<float>);
  m.def("shuffle_double", &shuffle<double>);
  m.def("shuffle_long", &shuffle<unsigned long long>);
  m.def("votes", &votes);
  m.def("atomics", &atomics);
  m.def("places", [](unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz) {
    return places({gx, gy, gz}, {bx, by, bz});
  });

  m.def("numbers_float", &numbers<float>);
  m.def("numbers_double", &numbers<double>);
  m.def("float_pairs", &float_pairs);
  m.def("hints", &hints);

  m.def("half_to_float", [](Array<unsigned short> bits) {
    return map<float>(bits, [](unsigned short x) { return __half2float(__ushort_as_half(x)); });
  });
  m.def("float_to_half", [](Array<float> values) {
    return map<unsigned short>(values,
                               [](float x) { return __half_as_ushort(__float2half_rn(x)); });
  });
  m.def("bfloat16_to_float", [](Array<unsigned short> bits) {
    return map<float>(bits,
                      [](unsigned short x) { return __bfloat162float(__ushort_as_bfloat16(x)); });
  });
  m.def("float_to_bfloat16", [](Array<float> values) {
    return map<unsigned short>(
        values, [](float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); });
  });
}
