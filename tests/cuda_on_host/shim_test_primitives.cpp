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
