// A grid of fibers, and who may run.
//
// A thread runs until it waits for others or ends; only at atomics and fences may it be switched
// out before. The order is unfair: blocks, warps and threads have levels, drawn from the seed, and
// what is ready on the highest level runs. So some run as far ahead as the barriers let them while
// others have not begun, and where a barrier is missing they read what is not there yet, or
// overwrite what is still needed. Asynchronous copies arrive as late as their thread's waits let
// them, or earlier; bulk copies arrive in between or when no thread can go on.
#pragma once

#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "device_functions.h"
#include "fibers.h"

namespace cuda_on_host {

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  unsigned below(unsigned n) { return unsigned((next() >> 32) * n >> 32); }

 private:
  uint64_t state_;
};

// A block's shared memory, an allocation of its own so that AddressSanitizer sees its ends. It
// holds NaN before the block starts and after its last thread has ended.
class SharedMemory {
 public:
  explicit SharedMemory(size_t size);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* data() const { return data_; }
  bool holds(const void* p, size_t bytes) const {
    const auto offset = uintptr_t(p) - uintptr_t(data_);
    return offset <= size_ && bytes <= size_ - offset;
  }
  void expire();
  bool written_since_expiry() const;

 private:
  const size_t size_;
  char* const data_;
};

struct Warp;
struct Block;
struct Cluster;

// An asynchronous copy that has not arrived. What its thread does not wait for, never does.
struct Copy {
  char* to;
  const char* from;
  unsigned size, zeros;  // bytes; the last ones are zeroed instead of read
  uint64_t group;
};

// A bulk copy or a message to another block that has not arrived. It is nobody's: it arrives at any
// time, and at the latest when no thread can go on.
struct BulkCopy {
  char* to;
  const char* from;  // absent for a message, which is already here
  std::vector<char> message;
  size_t size;
  uint64_t* mbarrier;
  Block* block;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Block* block;
  Warp* warp;
  unsigned lane;
  uint3 index;
  unsigned level;
  bool ended = false;

  Primitive waits_at = Primitive::none;
  unsigned mask;             // of a warp primitive: who takes part,
  uint64_t value;            // what this thread came with,
  unsigned source;           // whose value it wants,
  uint64_t answer;           // and what it gets; of a block's barrier, the number of predicates
  bool arrived = false;      // at the cluster's barrier, without having waited there yet
  uint64_t phase;            // of the cluster's barrier, when it arrived
  const unsigned* counter;   // of a wait for one,
  unsigned least;            // and what it must have reached
  const uint64_t* mbarrier;  // of a wait for a phase of one,
  unsigned parity;           // and the phase's

  std::vector<Copy> copies;
  uint64_t copy_group = 0;  // of the copies to come
};

struct Warp {
  Thread* lanes[warpSize];
  unsigned live = 0, waiting = 0;  // lanes
};

struct Block {
  Block(Cluster& cluster, uint3 index, unsigned rank, size_t shared_bytes)
      : cluster(cluster), index(index), rank(rank), memory(shared_bytes) {}

  Cluster& cluster;
  const uint3 index;
  const unsigned rank;
  SharedMemory memory;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned live = 0;  // threads
  Primitive barrier = Primitive::none;
  unsigned arrived = 0, predicates = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned live = 0, arrived = 0;  // threads
  uint64_t phase = 0;
};

// The threads that can go on.
class Ready {
 public:
  static constexpr unsigned levels = 64;

  bool empty() const { return occupied_ == 0; }
  void push(Thread& thread) {
    threads_[thread.level].push_back(&thread);
    occupied_ |= uint64_t(1) << thread.level;
  }
  Thread& pop(Random&);  // any of the highest level

 private:
  std::vector<Thread*> threads_[levels];
  uint64_t occupied_ = 0;
};

struct Shape {
  dim3 grid, block, cluster;
  size_t shared_bytes;
  bool all_resident;
};

inline uint64_t volume(const dim3& size) { return uint64_t(size.x) * size.y * size.z; }

class Grid {
 public:
  Grid(const Shape&, const std::function<void()>& kernel, uint64_t seed);
  ~Grid();
  Grid(const Grid&) = delete;
  Grid& operator=(const Grid&) = delete;

  void run();

  // The one that runs, and its thread; null where none does.
  static Grid* current;
  static Thread* thread;

  void wait(Primitive at);  // until somebody wakes this thread
  void wake(Thread& thread);
  void draw_levels(Block&);
  void maybe_switch();
  void let_copies_arrive();  // some of this thread's
  void let_a_bulk_copy_arrive();
  bool has_bulk_copies(const Block&) const;

  Random random;
  std::vector<BulkCopy> bulk_copies;
  std::vector<Thread*> waiting;  // for counters in global memory

 private:
  void admit();
  void populate(Block&);
  void retire(Thread&);
  [[noreturn]] void report_deadlock() const;
  static void thread_main();

  const Shape shape_;
  const std::function<void()>& kernel_;
  unsigned weight_of_block_, weight_of_warp_, weight_of_thread_;
  unsigned atomics_to_a_switch_;
  unsigned copy_delay_;            // 1: none
  std::vector<unsigned> to_come_;  // clusters
  std::vector<std::unique_ptr<Cluster>> resident_;
  size_t resident_blocks_ = 0;
  Ready ready_;
  std::exception_ptr failure_;
};

// Lets those go on for whom a thread's end completes the meeting.
void leave_meetings(Thread&);

const char* name_of(Primitive);
std::string name_of(const Thread&);
[[noreturn]] void fail(const Thread&, const std::string& what);

}  // namespace cuda_on_host
