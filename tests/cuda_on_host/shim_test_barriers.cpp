// Barriers and the order of threads. A flag for each barrier says whether it is there.
#include <algorithm>

#include "shim_test.h"

namespace {

__global__ void block_sums_kernel(const double* values, double* sums, int rounds, bool before_read,
                                  bool before_reuse) {
  double* warps = shared<double>();
  for (int round = 0; round < rounds; ++round) {
    double x = values[(int64_t(blockIdx.x) * rounds + round) * blockDim.x + threadIdx.x];
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffff, x, lanes);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    if (before_read) __syncthreads();
    double sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += warps[warp];
    if (threadIdx.x == round % blockDim.x) sums[blockIdx.x * rounds + round] = sum;
    if (before_reuse) __syncthreads();
  }
}

Array<double> block_sums(Array<double> values, bool before_read, bool before_reuse) {
  const int blocks = int(values.shape(0)), rounds = int(values.shape(1));
  const unsigned threads = unsigned(values.shape(2));
  Array<double> sums({blocks, rounds});
  Launch{unsigned(blocks), threads, unsigned(threads / 32 * sizeof(double))}(
      block_sums_kernel, values.data(), sums.mutable_data(), rounds, before_read, before_reuse);
  return sums;
}

__global__ void neighbours_kernel(int* got, int rounds, bool before_read, bool before_reuse) {
  int* slots = shared<int>();
  for (int round = 0; round < rounds; ++round) {
    slots[threadIdx.x] = round * int(blockDim.x) + int(threadIdx.x);
    if (before_read) __syncwarp();
    got[round * blockDim.x + threadIdx.x] = slots[threadIdx.x ^ 1];
    if (before_reuse) __syncwarp();
  }
}

Array<int> neighbours(int rounds, int threads, bool before_read, bool before_reuse) {
  Array<int> got({rounds, threads});
  Launch{1, unsigned(threads), unsigned(threads * sizeof(int))}(
      neighbours_kernel, got.mutable_data(), rounds, before_read, before_reuse);
  return got;
}

__global__ void ring_kernel(int* got, bool before_read, bool before_exit, bool map_early) {
  int* mine = shared<int>() + threadIdx.x;
  const unsigned next = (cuda_on_host::cluster_rank() + 1) % cuda_on_host::cluster_size();
  const int* other = map_early ? cuda_on_host::map_shared(mine, next) : nullptr;
  *mine = int(thread_of_grid());
  if (before_read) cuda_on_host::cluster_sync();
  if (!map_early) other = cuda_on_host::map_shared(mine, next);
  got[thread_of_grid()] = *other;
  if (before_exit) cuda_on_host::cluster_sync();
}

Array<int> ring(int blocks, int threads, int cluster, bool before_read, bool before_exit,
                bool map_early) {
  Array<int> got({blocks, threads});
  cudaFuncSetAttribute(ring_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  Launch{unsigned(blocks), unsigned(threads), unsigned(threads * sizeof(int)), unsigned(cluster)}(
      ring_kernel, got.mutable_data(), before_read, before_exit, map_early);
  return got;
}

__global__ void last_block_kernel(const double* values, double* squares, double* total,
                                  unsigned* counter, bool before_ticket) {
  squares[thread_of_grid()] = values[thread_of_grid()] * values[thread_of_grid()];
  if (before_ticket) __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicInc(counter, gridDim.x - 1) != gridDim.x - 1) return;
  __threadfence();
  *total = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) *total += squares[i];
}

py::tuple last_block(Array<double> values, bool before_ticket) {
  Array<double> squares({values.shape(0), values.shape(1)});
  std::fill_n(squares.mutable_data(), squares.size(), NAN);
  double total = NAN;
  unsigned counter = 0;
  Launch{unsigned(values.shape(0)), unsigned(values.shape(1))}(
      last_block_kernel, values.data(), squares.mutable_data(), &total, &counter, before_ticket);
  return py::make_tuple(total, counter);
}

__global__ void order_kernel(unsigned* tickets, unsigned* order, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    order[atomicAdd(tickets, 1)] = thread_of_grid();
    __syncthreads();
  }
}

Array<unsigned> order(int blocks, int threads, int rounds) {
  Array<unsigned> order(blocks * threads * rounds);
  unsigned tickets = 0;
  Launch{unsigned(blocks), unsigned(threads)}(order_kernel, &tickets, order.mutable_data(), rounds);
  return order;
}

// A barrier of the grid, by hand.
__global__ void grid_barrier_kernel(unsigned* arrived, unsigned* seen) {
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1);
    while (atomicAdd(arrived, 0) < gridDim.x) continue;
  }
  __syncthreads();
  seen[thread_of_grid()] = *arrived;
}

Array<unsigned> grid_barrier(int blocks, int threads) {
  Array<unsigned> seen({blocks, threads});
  unsigned arrived = 0;
  Launch launch{unsigned(blocks), unsigned(threads)};
  launch.cooperative = true;
  launch(grid_barrier_kernel, &arrived, seen.mutable_data());
  return seen;
}

// Blocks draw a number each and wait for those before them: each finds what the last one wrote.
// What is counted are the blocks that are done, or with `counts` false nothing.
__global__ void chain_kernel(unsigned* counters, int* written, bool waits, bool before_count,
                             bool counts) {
  unsigned& ticket = *shared<unsigned>();
  if (threadIdx.x == 0) {
    ticket = atomicAdd(counters, 1);
    if (waits) cuda_on_host::wait_until(counters + 1, ticket);
  }
  __syncthreads();
  const int from = ticket == 0 ? 0 : int((ticket - 1) * blockDim.x);
  const int before = ticket == 0 ? 0 : written[from + (threadIdx.x + 1) % blockDim.x];
  written[ticket * blockDim.x + threadIdx.x] = before + 1;
  if (before_count) __syncthreads();
  if (threadIdx.x != 0 || !counts) return;
  __threadfence();
  atomicAdd(counters + 1, 1);
}

Array<int> chain(int blocks, int threads, bool waits, bool before_count, bool counts) {
  Array<int> written({blocks, threads});
  std::fill_n(written.mutable_data(), written.size(), -1000);
  unsigned counters[2] = {};
  Launch{unsigned(blocks), unsigned(threads), sizeof(unsigned)}(
      chain_kernel, counters, written.mutable_data(), waits, before_count, counts);
  return written;
}

// Barriers for the threads that are left, and an arrival that does not wait.
__global__ void leavers_kernel(int* counts, unsigned stay) {
  if (threadIdx.x >= stay) return;
  counts[threadIdx.x] = __syncthreads_count(1);
  if (threadIdx.x == 0) cuda_on_host::cluster_arrive();
  __syncthreads();
  if (threadIdx.x != 0) cuda_on_host::cluster_arrive();
  cuda_on_host::cluster_wait();
}

Array<int> leavers(int threads, int stay) {
  Array<int> counts(stay);
  Launch{1, unsigned(threads)}(leavers_kernel, counts.mutable_data(), unsigned(stay));
  return counts;
}

}  // namespace

void define_barriers(py::module_& m) {
  m.def("block_sums", &block_sums, py::arg("values"), py::kw_only(), py::arg("before_read") = true,
        py::arg("before_reuse") = true);
  m.def("neighbours", &neighbours, py::arg("rounds"), py::arg("threads"), py::kw_only(),
        py::arg("before_read") = true, py::arg("before_reuse") = true);
  m.def("ring", &ring, py::arg("blocks"), py::arg("threads"), py::arg("cluster"), py::kw_only(),
        py::arg("before_read") = true, py::arg("before_exit") = true, py::arg("map_early") = false);
  m.def("last_block", &last_block, py::arg("values"), py::kw_only(),
        py::arg("before_ticket") = true);
  m.def("order", &order, py::arg("blocks"), py::arg("threads"), py::arg("rounds"));
  m.def("grid_barrier", &grid_barrier);
  m.def("chain", &chain, py::arg("blocks"), py::arg("threads"), py::kw_only(),
        py::arg("waits") = true, py::arg("before_count") = true, py::arg("counts") = true);
  m.def("leavers", &leavers);
}
