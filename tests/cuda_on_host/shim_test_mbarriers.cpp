// Bulk copies, messages to other blocks, and the mbarriers that count their bytes. A flag for each
// step says whether it is there.
#include "shim_test.h"

namespace {

struct Steps {
  bool after_init, wait, before_reuse, other_parity;
  unsigned depth;
  int more_bytes;  // expected than are copied
};

// Rounds are read `depth` rounds after one thread has asked for them.
__global__ void staged_kernel(const uint4* values, uint4* got, unsigned rounds, Steps steps) {
  const unsigned threads = blockDim.x, stages = steps.depth + 1;
  const unsigned bytes = threads * unsigned(sizeof(uint4));
  uint4* const memory = shared<uint4>();
  auto* const arrivals = reinterpret_cast<uint64_t*>(memory + stages * threads);
  if (threadIdx.x == 0)
    for (unsigned i = 0; i < stages; ++i) cuda_on_host::mbarrier_init(arrivals + i, 1);
  if (steps.after_init) __syncthreads();
  for (unsigned round = 0; round < rounds + steps.depth; ++round) {
    const unsigned next = round % stages;
    if (round < rounds && threadIdx.x == 0) {
      cuda_on_host::mbarrier_expect(arrivals + next, bytes + unsigned(steps.more_bytes));
      cuda_on_host::copy_bulk(memory + next * threads, values + round * threads, bytes,
                              arrivals + next);
    }
    if (round < steps.depth) continue;
    const unsigned ready = round - steps.depth, stage = ready % stages;
    if (steps.wait)
      cuda_on_host::mbarrier_wait(arrivals + stage, (ready / stages + steps.other_parity) % 2);
    got[ready * threads + threadIdx.x] = memory[stage * threads + threadIdx.x];
    if (steps.before_reuse) __syncthreads();
  }
}

Array<unsigned> staged(Array<unsigned> values, const Steps& steps) {
  Array<unsigned> got({values.shape(0), values.shape(1), values.shape(2)});
  const unsigned rounds = unsigned(values.shape(0)), threads = unsigned(values.shape(1));
  const size_t of_stage = threads * sizeof(uint4) + sizeof(uint64_t);
  Launch{1, threads, unsigned((steps.depth + 1) * of_stage)}(
      staged_kernel, reinterpret_cast<const uint4*>(values.data()),
      reinterpret_cast<uint4*>(got.mutable_data()), rounds, steps);
  return got;
}

// The source changes while the copy is on its way.
__global__ void changed_kernel(float* source, float* got) {
  float* const memory = shared<float>();
  auto* const arrival = reinterpret_cast<uint64_t*>(memory + 4);
  cuda_on_host::mbarrier_init(arrival, 1);
  cuda_on_host::mbarrier_expect(arrival, 16);
  cuda_on_host::copy_bulk(memory, source, 16, arrival);
  __syncthreads();
  *source = 2;
  got[0] = *memory;
  __syncthreads();
  got[1] = *memory;
  cuda_on_host::mbarrier_wait(arrival, 0);
  got[2] = *memory;
}

Array<float> changed() {
  alignas(16) float source[4] = {1};
  Array<float> got(3);
  Launch{1, 1, 24}(changed_kernel, source, got.mutable_data());
  return got;
}

// Blocks of a warp that send each other a number in each round. A round's messages have one of two
// places.
__global__ void exchange_kernel(unsigned* got, unsigned rounds, int more_bytes, bool after_init,
                                bool wait) {
  const unsigned all = gridDim.x, lane = threadIdx.x, rank = cuda_on_host::cluster_rank();
  uint4* const messages = shared<uint4>();
  auto* const arrivals = reinterpret_cast<uint64_t*>(messages + 2 * warpSize);
  if (lane < 2) cuda_on_host::mbarrier_init(arrivals + lane, 1);
  if (after_init)
    cuda_on_host::cluster_sync();
  else
    __syncwarp();
  for (unsigned round = 0; round < rounds; ++round) {
    uint4* const to = messages + round % 2 * warpSize;
    uint64_t* const arrival = arrivals + round % 2;
    if (lane == 0)
      cuda_on_host::mbarrier_expect(arrival, all * unsigned(sizeof *to) + unsigned(more_bytes));
    if (lane < all)
      cuda_on_host::store_async(to + rank, uint4{100 * round + rank, 0, 0, 0}, arrival, lane);
    if (wait) cuda_on_host::mbarrier_wait(arrival, round / 2 % 2);
    if (lane < all) got[(rank * rounds + round) * all + lane] = to[lane].x;
    __syncwarp();
  }
}

Array<unsigned> exchange(unsigned blocks, unsigned rounds, int more_bytes, bool after_init,
                         bool wait) {
  Array<unsigned> got({blocks, rounds, blocks});
  const unsigned bytes = 2 * (warpSize * sizeof(uint4) + sizeof(uint64_t));
  Launch{blocks, warpSize, bytes, blocks}(exchange_kernel, got.mutable_data(), rounds, more_bytes,
                                          after_init, wait);
  return got;
}

}  // namespace

void define_mbarriers(py::module_& m) {
  m.def(
      "staged_in_bulk",
      [](Array<unsigned> values, unsigned depth, int more_bytes, bool after_init, bool wait,
         bool before_reuse, bool other_parity) {
        return staged(values, {after_init, wait, before_reuse, other_parity, depth, more_bytes});
      },
      py::arg("values"), py::arg("depth"), py::kw_only(), py::arg("more_bytes") = 0,
      py::arg("after_init") = true, py::arg("wait") = true, py::arg("before_reuse") = true,
      py::arg("other_parity") = false);
  m.def("changed_in_bulk", &changed);
  m.def("exchange", &exchange, py::arg("blocks"), py::arg("rounds"), py::kw_only(),
        py::arg("more_bytes") = 0, py::arg("after_init") = true, py::arg("wait") = true);
}
