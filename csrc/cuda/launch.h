// How a kernel is started: its grid, block, cluster, shared memory and stream, and what went wrong.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "scratch.h"

namespace fastkd::cuda {

inline void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that nobody else is blamed for it
  throw std::runtime_error(std::string("CUDA, ") + doing + ": " + cudaGetErrorString(status));
}

// A stream of a device, which is the current one while this lives.
class Stream {
 public:
  explicit Stream(const Place& place)
      : device(place.device), handle(reinterpret_cast<cudaStream_t>(place.handle)) {
    check(cudaGetDevice(&previous_), "asking for the device");
    if (device != previous_) check(cudaSetDevice(device), "choosing the device");
  }
  ~Stream() {
    if (device != previous_) cudaSetDevice(previous_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const int device;
  const cudaStream_t handle;

 private:
  int previous_ = 0;
};

constexpr int kSystemBytes = 1024;  // of each block's shared memory

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks that share their shared memory
};

inline int attribute(cudaDeviceAttr which, const Stream& stream) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, stream.device), "asking for an attribute");
  return value;
}

// A grid as the runtime wants it; `cluster` must outlive it.
inline cudaLaunchConfig_t config_of(const Grid& grid, const Stream& stream,
                                    cudaLaunchAttribute& cluster) {
  cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream.handle;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  return config;
}

// Lets a kernel have the shared memory and the cluster that it does not have by itself.
inline cudaError_t allow(const void* kernel, const Grid& grid) {
  constexpr size_t always_there = 48 << 10;
  constexpr int everywhere = 8;
  cudaError_t status = cudaSuccess;
  if (grid.shared_bytes > always_there)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(grid.shared_bytes));
  if (status == cudaSuccess && grid.cluster > everywhere)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return status;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, const Stream& stream,
            Arguments&&... arguments) {
  check(allow(reinterpret_cast<const void*>(kernel), grid), "asking for a kernel's resources");
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = config_of(grid, stream, cluster);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...),
        "launching a kernel");
}

// The compute capability, times 10, that a kernel was compiled for: less than the chip's where the
// driver translated it.
template <class... Parameters>
int architecture_of(void (*kernel)(Parameters...), const Stream& stream) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] =
      known.try_emplace({reinterpret_cast<const void*>(kernel), stream.device}, 0);
  if (!is_new) return found->second;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel's attributes");
  return found->second = attributes.ptxVersion;
}

// As many clusters of a kernel, or blocks where a cluster is one, as the device runs at a time;
// none where it cannot run it.
template <class... Parameters>
int64_t resident_clusters(void (*kernel)(Parameters...), const Grid& grid, const Stream& stream) {
  using Key = std::tuple<const void*, int, int, size_t, int>;
  static std::mutex mutex;
  static std::map<Key, int64_t> known;  // the questions take microseconds
  const auto* const address = reinterpret_cast<const void*>(kernel);
  const Key key{address, stream.device, grid.threads, grid.shared_bytes, grid.cluster};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace(key, 0);
  if (!is_new) return found->second;
  if (grid.shared_bytes > size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, stream)))
    return 0;
  int count = 0;
  cudaError_t status = allow(address, grid);
  if (grid.cluster > 1) {
    constexpr int first_with_clusters = 90;
    cudaLaunchAttribute cluster;
    Grid one = grid;
    one.blocks = grid.cluster;
    const cudaLaunchConfig_t config = config_of(one, stream, cluster);
    if (status == cudaSuccess && architecture_of(kernel, stream) >= first_with_clusters)
      status = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    if (status != cudaSuccess) {
      cudaGetLastError();  // a size that this chip does not have
      count = 0;
    }
  } else {
    if (status == cudaSuccess)
      status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, grid.threads,
                                                             grid.shared_bytes);
    check(status, "asking for the occupancy");
    count *= attribute(cudaDevAttrMultiProcessorCount, stream);
  }
  return found->second = count;
}

}  // namespace fastkd::cuda
