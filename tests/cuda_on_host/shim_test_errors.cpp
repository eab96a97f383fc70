// What is refused: launches, and kernels that misuse what they call.
#include <string>

#include "cuda_pipeline.h"
#include "shim_test.h"

namespace {

__global__ void write_after_end_kernel() {
  int* other = cuda_on_host::map_shared(shared<int>(), 1 - cuda_on_host::cluster_rank());
  cuda_on_host::cluster_sync();
  *other = 1;
}

__global__ void empty_kernel() {}

__global__ void garbage_kernel(float* got) { *got = *shared<float>(); }

__global__ void overrun_kernel() { shared<char>()[64] = 1; }

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    cuda_on_host::cluster_sync();
}
__global__ void absent_lane_kernel() {
  if (threadIdx.x == 5)
    __syncthreads();
  else
    __shfl_xor_sync(0xffffffff, 1, 1);
}
__global__ void ended_lane_kernel() {
  if (threadIdx.x != 5) __shfl_xor_sync(0xffffffff, 1, 1);
}
__global__ void outside_mask_kernel() {
  if (threadIdx.x < 4) __shfl_sync(0xf, 1, 5);
}
__global__ void left_out_kernel() { __syncwarp(0xfffffffe); }
__global__ void odd_width_kernel() { __shfl_sync(0xffffffff, 1, 0, 12); }
__global__ void mixed_barriers_kernel() {
  threadIdx.x < 32 ? __syncthreads() : void(__syncthreads_or(1));
}
__global__ void wait_alone_kernel() { cuda_on_host::cluster_wait(); }
__global__ void arrive_twice_kernel() {
  cuda_on_host::cluster_arrive();
  cuda_on_host::cluster_arrive();
}
__global__ void map_elsewhere_kernel() {
  int local = 0;
  cuda_on_host::map_shared(&local, 0);
}
__global__ void map_too_far_kernel() { cuda_on_host::map_shared(shared<int>(), 2); }
__global__ void wait_at_misaligned_kernel() {
  cuda_on_host::wait_until(reinterpret_cast<unsigned*>(shared<char>() + 2), 0);
}
__global__ void misaligned_kernel() {
  __ldg(reinterpret_cast<const float4*>(shared<float>() + threadIdx.x));
}

alignas(16) float source[16];

__global__ void copy_12_bytes_kernel() { __pipeline_memcpy_async(shared<float>(), source, 12); }
__global__ void copy_too_many_zeros_kernel() {
  __pipeline_memcpy_async(shared<float>(), source, 4, 5);
}
__global__ void copy_elsewhere_kernel() {
  alignas(16) float local[4];
  __pipeline_memcpy_async(local, source, 16);
}
__global__ void copy_overrun_kernel() { __pipeline_memcpy_async(shared<float>() + 16, source, 4); }
__global__ void copy_to_another_block_kernel() {
  const unsigned other = 1 - cuda_on_host::cluster_rank();
  __pipeline_memcpy_async(cuda_on_host::map_shared(shared<float>(), other), source, 4);
  cuda_on_host::cluster_sync();
}
__global__ void copy_from_shared_kernel() {
  __pipeline_memcpy_async(shared<float>(), shared<float>() + 4, 16);
}
__global__ void copy_to_misaligned_kernel() {
  __pipeline_memcpy_async(shared<float>() + 2, source, 16);
}
__global__ void copy_from_misaligned_kernel() {
  __pipeline_memcpy_async(shared<float>(), source + 1, 8);
}

// Of a block's 64 bytes.
uint64_t* mbarrier() { return shared<uint64_t>() + 7; }
void copy_bulk_of_new_mbarrier(void* to, const void* from, size_t bytes) {
  if (threadIdx.x != 0) return;
  cuda_on_host::mbarrier_init(mbarrier(), 1);
  cuda_on_host::copy_bulk(to, from, bytes, mbarrier());
}

__global__ void bulk_copy_8_bytes_kernel() {
  copy_bulk_of_new_mbarrier(shared<float>(), source, 8);
}
__global__ void bulk_copy_nothing_kernel() {
  copy_bulk_of_new_mbarrier(shared<float>(), source, 0);
}
__global__ void bulk_copy_elsewhere_kernel() {
  alignas(16) float local[4];
  copy_bulk_of_new_mbarrier(local, source, 16);
}
__global__ void bulk_copy_overrun_kernel() {
  copy_bulk_of_new_mbarrier(shared<float>() + 12, source, 32);
}
__global__ void bulk_copy_from_shared_kernel() {
  copy_bulk_of_new_mbarrier(shared<float>(), shared<float>() + 4, 16);
}
__global__ void bulk_copy_to_misaligned_kernel() {
  copy_bulk_of_new_mbarrier(shared<float>() + 2, source, 16);
}
__global__ void bulk_copy_from_misaligned_kernel() {
  copy_bulk_of_new_mbarrier(shared<float>(), source + 2, 16);
}
__global__ void bulk_copy_left_alone_kernel() {
  copy_bulk_of_new_mbarrier(shared<float>(), source, 16);
}
__global__ void wait_before_init_kernel() { cuda_on_host::mbarrier_wait(mbarrier(), 0); }
__global__ void expect_twice_kernel() {
  if (threadIdx.x != 0) return;
  cuda_on_host::mbarrier_init(mbarrier(), 1);
  for (int i = 0; i < 2; ++i) cuda_on_host::mbarrier_expect(mbarrier(), 16);
}
__global__ void mbarrier_elsewhere_kernel() {
  uint64_t local = 0;
  cuda_on_host::mbarrier_wait(&local, 0);
}
__global__ void mbarrier_misaligned_kernel() {
  cuda_on_host::mbarrier_init(reinterpret_cast<uint64_t*>(shared<char>() + 4), 1);
}

void misuse(const std::string& what) {
  const std::pair<const char*, void (*)()> kernels[] = {
      {"overrun", overrun_kernel},
      {"divergent barrier", divergent_barrier_kernel},
      {"absent lane", absent_lane_kernel},
      {"ended lane", ended_lane_kernel},
      {"outside mask", outside_mask_kernel},
      {"left out", left_out_kernel},
      {"odd width", odd_width_kernel},
      {"mixed barriers", mixed_barriers_kernel},
      {"wait alone", wait_alone_kernel},
      {"arrive twice", arrive_twice_kernel},
      {"map elsewhere", map_elsewhere_kernel},
      {"map too far", map_too_far_kernel},
      {"misaligned", misaligned_kernel},
      {"wait at misaligned", wait_at_misaligned_kernel},
      {"copy 12 bytes", copy_12_bytes_kernel},
      {"copy too many zeros", copy_too_many_zeros_kernel},
      {"copy elsewhere", copy_elsewhere_kernel},
      {"copy overrun", copy_overrun_kernel},
      {"copy to another block", copy_to_another_block_kernel},
      {"copy from shared", copy_from_shared_kernel},
      {"copy to misaligned", copy_to_misaligned_kernel},
      {"copy from misaligned", copy_from_misaligned_kernel},
      {"bulk copy 8 bytes", bulk_copy_8_bytes_kernel},
      {"bulk copy nothing", bulk_copy_nothing_kernel},
      {"bulk copy elsewhere", bulk_copy_elsewhere_kernel},
      {"bulk copy overrun", bulk_copy_overrun_kernel},
      {"bulk copy from shared", bulk_copy_from_shared_kernel},
      {"bulk copy to misaligned", bulk_copy_to_misaligned_kernel},
      {"bulk copy from misaligned", bulk_copy_from_misaligned_kernel},
      {"bulk copy left alone", bulk_copy_left_alone_kernel},
      {"wait before init", wait_before_init_kernel},
      {"expect twice", expect_twice_kernel},
      {"mbarrier elsewhere", mbarrier_elsewhere_kernel},
      {"mbarrier misaligned", mbarrier_misaligned_kernel},
      {"write after end", write_after_end_kernel},
  };
  for (const auto& [name, kernel] : kernels)
    if (what == name) return Launch{2, 64, 64, 2}(kernel);
  throw std::invalid_argument(what);
}

cudaError_t allow(int shared_bytes, bool non_portable) {
  const cudaError_t error =
      cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  return error ? error
               : cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed,
                                      non_portable);
}

const char* launch_error(unsigned blocks, unsigned threads, unsigned shared_bytes, unsigned cluster,
                         bool cooperative, int allowed_shared, bool non_portable) {
  if (const cudaError_t error = allow(allowed_shared, non_portable)) return cudaGetErrorName(error);
  Launch launch{blocks, threads, shared_bytes, cluster};
  launch.cooperative = cooperative;
  return cudaGetErrorName(launch.status(empty_kernel));
}

py::dict device() {
  py::dict got;
  int device = -1;
  cudaGetDevice(&device);
  for (const auto& [name, attribute] :
       {std::pair("multiprocessors", cudaDevAttrMultiProcessorCount),
        std::pair("major", cudaDevAttrComputeCapabilityMajor),
        std::pair("minor", cudaDevAttrComputeCapabilityMinor),
        std::pair("threads", cudaDevAttrMaxThreadsPerMultiProcessor),
        std::pair("shared_bytes", cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        std::pair("shared_bytes_of_block", cudaDevAttrMaxSharedMemoryPerBlockOptin),
        std::pair("clusters", cudaDevAttrClusterLaunch)}) {
    int value = -1;
    cudaDeviceGetAttribute(&value, attribute, device);
    got[name] = value;
  }
  return got;
}

// Blocks on a multiprocessor and clusters on the device, or the error's name. A cluster of 0 blocks
// is not stated.
py::tuple occupancy(int threads, unsigned shared_bytes, unsigned cluster, bool non_portable) {
  int blocks = 0, clusters = 0;
  allow(int(shared_bytes), non_portable);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, empty_kernel, threads, shared_bytes);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config{dim3(cluster ? cluster : 1),
                                  dim3(unsigned(threads)),
                                  shared_bytes,
                                  nullptr,
                                  &attribute,
                                  cluster ? 1u : 0u};
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, empty_kernel, &config);
  if (error) return py::make_tuple(blocks, cudaGetErrorName(error));
  return py::make_tuple(blocks, clusters);
}

// Shared memory and clusters of more than 8 blocks.
py::tuple allowed() {
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, empty_kernel);
  return py::make_tuple(attributes.maxDynamicSharedSizeBytes,
                        bool(attributes.nonPortableClusterSizeAllowed));
}

float garbage() {
  float got = 0;
  Launch{1, 1, sizeof(float)}(garbage_kernel, &got);
  return got;
}

}  // namespace

void define_errors(py::module_& m) {
  m.def("misuse", &misuse);
  m.def("garbage", &garbage);
  m.def("launch_error", &launch_error, py::kw_only(), py::arg("blocks") = 1,
        py::arg("threads") = 32, py::arg("shared_bytes") = 0, py::arg("cluster") = 1,
        py::arg("cooperative") = false, py::arg("allowed_shared") = 48 << 10,
        py::arg("non_portable") = false);
  m.def("device", &device);
  m.def("allowed", &allowed);
  m.def("occupancy", &occupancy, py::arg("threads"), py::arg("shared_bytes"), py::arg("cluster"),
        py::arg("non_portable") = false);
  m.def("last_errors", [] {
    py::list errors;
    for (const auto get : {cudaPeekAtLastError, cudaGetLastError, cudaGetLastError})
      errors.append(cudaGetErrorName(get()));
    return errors;
  });
}
