// A device for each kind of chip, with few multiprocessors. The first looks like Hopper.
#include "runtime_api.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>

#include "grid.h"

namespace {

using cuda_on_host::volume;

constexpr unsigned kMaxThreads = 1024;      // of a block
constexpr size_t kSharedMemory = 48 << 10;  // of a block that has not asked for more
constexpr size_t kReservedPerBlock = 1 << 10;
constexpr unsigned kPortableCluster = 8, kMaxCluster = 16;
constexpr int kMaxOccupancy = 2;

struct Chip {
  int major, minor;
  unsigned threads;      // of a multiprocessor,
  size_t shared_memory;  // and its bytes, of which a block may have all that are not reserved
  unsigned cluster;      // the most blocks in one, 0 where there are no clusters

  size_t shared_memory_of_block() const { return shared_memory - kReservedPerBlock; }
};
// That 16 blocks make a cluster is documented for the chips of data centers alone.
constexpr Chip chips[] = {
    {9, 0, 2048, 228 << 10, kMaxCluster},
    {8, 0, 2048, 164 << 10, 0},
    {8, 6, 1536, 100 << 10, 0},
    {8, 9, 1536, 100 << 10, 0},
    {10, 0, 2048, 228 << 10, kMaxCluster},
    {12, 0, 1536, 100 << 10, kPortableCluster},
};

int device_of(int major, int minor) {
  for (int device = 0; device < int(std::size(chips)); ++device)
    if (chips[device].major == major && chips[device].minor == minor) return device;
  throw std::invalid_argument("no chip of capability " + std::to_string(major) + "." +
                              std::to_string(minor));
}

struct Limits {
  size_t shared_memory = kSharedMemory;
  unsigned cluster = kPortableCluster;
};

std::mutex mutex;  // of all that follows, and of the fibers: one launch at a time
std::map<std::pair<int, const void*>, Limits> limits;  // of a kernel on a device
thread_local int current = 0;                          // device
int multiprocessors = 2;
bool capturing = false;
uint64_t seed = 0, launches = 0;
thread_local cudaError_t last_error = cudaSuccess;

const Chip& chip() { return chips[current]; }

struct Description {
  cudaError_t error;
  const char *name, *text;
};
constexpr Description descriptions[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge",
     "too many blocks in cooperative launch"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize", "cluster misconfiguration"},
};

const Description& describe(cudaError_t error) {
  return *std::find_if(std::begin(descriptions), std::end(descriptions) - 1,
                       [&](const Description& one) { return one.error == error; });
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Attributes {
  dim3 cluster;
  bool has_cluster = false, cooperative = false;
};

cudaError_t read_attributes(const cudaLaunchConfig_t& config, Attributes& attributes) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        break;
      case cudaLaunchAttributeCooperative:
        attributes.cooperative = value.cooperative;
        break;
      case cudaLaunchAttributeClusterDimension:
        attributes.has_cluster = true;
        attributes.cluster = dim3(value.clusterDim.x, value.clusterDim.y, value.clusterDim.z);
        break;
      default:
        return cudaErrorInvalidValue;
    }
  }
  return cudaSuccess;
}

bool within(const dim3& size, uint64_t x, uint64_t y, uint64_t z) {
  return 0 < size.x && size.x <= x && 0 < size.y && size.y <= y && 0 < size.z && size.z <= z;
}

int occupancy(uint64_t threads, size_t shared_bytes) {
  const uint64_t blocks = std::min<uint64_t>(
      chip().threads / threads, chip().shared_memory / (shared_bytes + kReservedPerBlock));
  return int(std::min<uint64_t>(blocks, kMaxOccupancy));
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, Attributes& attributes) {
  if (const cudaError_t error = read_attributes(config, attributes)) return error;
  const dim3 &grid = config.gridDim, &block = config.blockDim, &cluster = attributes.cluster;
  if (!within(block, kMaxThreads, kMaxThreads, 64) || volume(block) > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  if (!within(grid, 0x7fffffff, 0xffff, 0xffff)) return cudaErrorInvalidConfiguration;
  const Limits& limit = limits[{current, kernel}];
  if (config.dynamicSmemBytes > limit.shared_memory) return cudaErrorInvalidValue;
  const unsigned most = std::min(limit.cluster, chip().cluster);
  if (attributes.has_cluster && (!within(cluster, most, most, most) || volume(cluster) > most))
    return cudaErrorInvalidClusterSize;
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    return cudaErrorInvalidClusterSize;
  const int resident = multiprocessors * occupancy(volume(block), config.dynamicSmemBytes);
  if (attributes.cooperative && volume(grid) > uint64_t(resident))
    return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

}  // namespace

namespace cuda_on_host {

void set_schedule(uint64_t new_seed) {
  const std::lock_guard<std::mutex> lock(mutex);
  seed = new_seed;
  launches = 0;
}

void set_multiprocessors(int count) {
  const std::lock_guard<std::mutex> lock(mutex);
  multiprocessors = count;
}

void set_capability(int major, int minor) { current = device_of(major, minor); }

void set_capturing(bool is_capturing) { capturing = is_capturing; }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& run) {
  const std::lock_guard<std::mutex> lock(mutex);
  Attributes attributes;
  if (const cudaError_t error = check(config, kernel, attributes)) return remember(error);
  const uint64_t schedule = Random(seed).next() + launches++;
  Grid({config.gridDim, config.blockDim, attributes.cluster, config.dynamicSmemBytes,
        attributes.cooperative},
       run, schedule)
      .run();
  return cudaSuccess;
}

}  // namespace cuda_on_host

const char* cudaGetErrorName(cudaError_t error) { return describe(error).name; }

const char* cudaGetErrorString(cudaError_t error) { return describe(error).text; }

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = int(std::size(chips));
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= int(std::size(chips))) return remember(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= int(std::size(chips))) return remember(cudaErrorInvalidDevice);
  const Chip& chip = chips[device];
  const auto answer = [&](size_t is) {
    *value = int(is);
    return cudaSuccess;
  };
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return answer(kMaxThreads);
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return answer(kSharedMemory);
    case cudaDevAttrWarpSize:
      return answer(warpSize);
    case cudaDevAttrMultiProcessorCount:
      return answer(size_t(multiprocessors));
    case cudaDevAttrL2CacheSize:
      return answer(50 << 20);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return answer(chip.threads);
    case cudaDevAttrComputeCapabilityMajor:
      return answer(size_t(chip.major));
    case cudaDevAttrComputeCapabilityMinor:
      return answer(size_t(chip.minor));
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return answer(chip.shared_memory);
    case cudaDevAttrCooperativeLaunch:
      return answer(1);
    case cudaDevAttrClusterLaunch:
      return answer(chip.cluster > 0);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return answer(chip.shared_memory_of_block());
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  Limits& limit = limits[{current, kernel}];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || size_t(value) > chip().shared_memory_of_block())
        return remember(cudaErrorInvalidValue);
      limit.shared_memory = size_t(value);
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      limit.cluster = value ? kMaxCluster : kPortableCluster;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Limits& limit = limits[{current, kernel}];
  *attributes = {};
  attributes->maxThreadsPerBlock = kMaxThreads;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 10 * chip().major + chip().minor;
  attributes->maxDynamicSharedSizeBytes = int(limit.shared_memory);
  attributes->nonPortableClusterSizeAllowed = limit.cluster > kPortableCluster;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (threads <= 0) return remember(cudaErrorInvalidValue);
  const bool fits =
      unsigned(threads) <= kMaxThreads && shared_bytes <= limits[{current, kernel}].shared_memory;
  *blocks = fits ? occupancy(uint64_t(threads), shared_bytes) : 0;
  return cudaSuccess;
}

// A cluster that may be launched always fits, however few multiprocessors there are.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  const std::lock_guard<std::mutex> lock(mutex);
  Attributes attributes;
  if (const cudaError_t error = check(*config, kernel, attributes)) return remember(error);
  if (!attributes.has_cluster) return remember(cudaErrorInvalidClusterSize);
  const uint64_t blocks =
      uint64_t(multiprocessors) * occupancy(volume(config->blockDim), config->dynamicSmemBytes);
  *clusters = int(std::max<uint64_t>(1, blocks / volume(attributes.cluster)));
  return cudaSuccess;
}
