// Ticket counters, by which a grid finds its last block. They live in the module and are 0 between
// launches: the last block of a launch resets them for the next one.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>

#include "device.h"
#include "launch.h"

namespace fastkd::cuda {

// Where a launch counts: in the module's counters from `first` on, or in memory of its own where
// that is negative.
struct Tickets {
  int first = -1;
  unsigned* own = nullptr;

  __device__ __forceinline__ unsigned* in(unsigned* counters) const {
    return first < 0 ? own : counters + first;
  }
};

// How many counters a module has: for each of so many streams, and for captured launches.
struct CounterSpace {
  int of_stream, streams, captured;
  constexpr int all() const { return of_stream * streams + captured; }
};

// Hands out counters so that no two launches that may run at the same time count in the same ones.
//
// Launches on a stream follow one another and share its counters. A captured launch may be replayed
// beside anything, so its counters are never given to another launch. Replays of one executable
// graph follow one another. Executable graphs that are instantiated from one captured graph, or
// that have it as a child, may overlap; but these also share the launch's scratch memory and
// outputs, and may no more overlap than any other two writers of the same memory.
class CounterPool {
 public:
  explicit CounterPool(const CounterSpace& space) : space_(space), captured_(space.captured) {}

  // So many counters, which are 0; `own` is memory for them where none is left.
  Tickets take(const Stream& stream, unsigned* own, size_t count = 1) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream.handle, &capture), "asking for a capture");
    const int first = capture == cudaStreamCaptureStatusNone ? of_stream(stream.handle, count)
                                                             : of_captured(count);
    if (first < 0)
      check(cudaMemsetAsync(own, 0, count * sizeof(unsigned), stream.handle), "clearing counters");
    return {first, own};
  }

  // For tests: at most so many counters for captured launches, from the first one on again. What
  // was captured before may not be replayed any more.
  void restart(int captured) {
    const std::lock_guard<std::mutex> lock(mutex_);
    captured_ = std::min(captured, space_.captured);
    taken_ = 0;
  }

 private:
  // cudaStreamPerThread is one handle for a stream of each thread.
  int of_stream(cudaStream_t handle, size_t count) {
    if (count > size_t(space_.of_stream)) return -1;
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::pair key{handle, handle == cudaStreamPerThread ? number_of_thread() : 0};
    auto found = slots_.find(key);
    if (found == slots_.end()) {
      if (slots_.size() == size_t(space_.streams)) return -1;
      found = slots_.emplace(key, int(slots_.size())).first;
    }
    return found->second * space_.of_stream;
  }

  int of_captured(size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (count > size_t(captured_ - taken_)) return -1;
    const int first = space_.of_stream * space_.streams + taken_;
    taken_ += int(count);
    return first;
  }

  // Which no other thread ever has, also after this one has ended: its last launch may still run.
  static uint64_t number_of_thread() {
    static std::atomic<uint64_t> next{1};
    thread_local const uint64_t mine = next++;
    return mine;
  }

  const CounterSpace space_;
  std::mutex mutex_;
  std::map<std::pair<cudaStream_t, uint64_t>, int> slots_;
  int captured_, taken_ = 0;
};

// One counter a launch, of all sums over a grid.
constexpr CounterSpace kGridCounters{1, 1024, 1 << 16};
inline CounterPool grid_counters(kGridCounters);

// Attention transfer counts units of work for each sample.
constexpr CounterSpace kAttentionCounters{8192, 16, 1 << 16};
inline CounterPool attention_counters(kAttentionCounters);

}  // namespace fastkd::cuda
