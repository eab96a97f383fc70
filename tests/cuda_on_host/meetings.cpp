// Where threads meet: a block's barrier, a warp's primitives, a cluster's barrier.
#include <cstdio>
#include <stdexcept>

#include "grid.h"

namespace cuda_on_host {
namespace {

bool is_shuffle(Primitive at) { return Primitive::shfl <= at && at <= Primitive::shfl_xor; }

// Threads that have ended are not waited for, as on the chip since Volta.
void complete(Block& block) {
  if (block.arrived == 0 || block.arrived < block.live) return;
  Grid& grid = *Grid::current;
  // Another order in every phase finds what needs a thread to be late first and early then.
  if (grid.random.below(2)) grid.draw_levels(block);
  for (Thread& thread : block.threads) {
    if (thread.waits_at != block.barrier) continue;
    thread.answer = block.predicates;
    grid.wake(thread);
  }
  block.arrived = block.predicates = 0;
}

// The meeting for which a lane waits.
void complete(Warp& warp, const Thread& waiting) {
  const unsigned mask = waiting.mask, expected = mask & warp.live;
  const Primitive at = waiting.waits_at;
  if ((warp.waiting & expected) != expected) return;
  const auto each = [&](auto&& f) {
    for (unsigned left = expected; left; left &= left - 1) f(*warp.lanes[__builtin_ctz(left)]);
  };
  bool together = true;
  unsigned ballot = 0;
  each([&](const Thread& lane) {
    together = together && lane.mask == mask && lane.waits_at == at;
    ballot |= unsigned(lane.value & 1) << lane.lane;
  });
  if (!together) return;
  if (is_shuffle(at) && mask != expected)
    fail(waiting, std::string(name_of(at)) + " names lanes that have ended or never were");
  each([&](Thread& lane) {
    lane.answer = is_shuffle(at) ? warp.lanes[lane.source]->value : ballot;
  });
  warp.waiting &= ~expected;
  each([&](Thread& lane) { Grid::current->wake(lane); });
}

void complete(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live) return;
  ++cluster.phase;
  cluster.arrived = 0;
  for (const auto& block : cluster.blocks)
    for (Thread& thread : block->threads)
      if (thread.waits_at == Primitive::cluster_wait) Grid::current->wake(thread);
}

void wait_among(std::vector<Thread*>& waiting, const unsigned* counter, unsigned least) {
  if (*counter >= least) return;
  Thread& self = *Grid::thread;
  self.counter = counter;
  self.least = least;
  waiting.push_back(&self);
  Grid::current->wait(Primitive::wait_for);
}

void wake_satisfied(std::vector<Thread*>& waiting) {
  for (size_t i = 0; i < waiting.size();) {
    Thread& other = *waiting[i];
    if (*other.counter < other.least) {
      ++i;
      continue;
    }
    waiting[i] = waiting.back();
    waiting.pop_back();
    Grid::current->wake(other);
  }
}

uint64_t meet(Primitive at, unsigned mask, uint64_t value, unsigned source) {
  Thread& self = *Grid::thread;
  if (!(mask >> self.lane & 1))
    fail(self, std::string(name_of(at)) + " with a mask that leaves the caller out");
  if (!(mask >> source & 1))
    fail(self, std::string(name_of(at)) + " reads lane " + std::to_string(source) +
                   ", which its mask leaves out");
  self.mask = mask;
  self.value = value;
  self.source = source;
  self.waits_at = at;
  self.warp->waiting |= 1u << self.lane;
  complete(*self.warp, self);
  Fiber::suspend();
  return self.answer;
}

}  // namespace

void leave_meetings(Thread& thread) {
  Block& block = *thread.block;
  Cluster& cluster = block.cluster;
  Warp& warp = *thread.warp;
  complete(block);
  warp.live &= ~(1u << thread.lane);
  for (unsigned left = warp.waiting; left; left &= warp.waiting & (left - 1))
    complete(warp, *warp.lanes[__builtin_ctz(left)]);
  if (thread.arrived && thread.phase == cluster.phase) --cluster.arrived;
  complete(cluster);
}

int meet_block(Primitive at, bool predicate) {
  Thread& self = *Grid::thread;
  Block& block = *self.block;
  if (block.arrived > 0 && block.barrier != at)
    fail(self,
         std::string(name_of(at)) + " where others of the block wait at " + name_of(block.barrier));
  block.barrier = at;
  ++block.arrived;
  block.predicates += predicate;
  self.waits_at = at;
  complete(block);
  Fiber::suspend();
  return int(self.answer);
}

unsigned meet_warp(Primitive at, unsigned mask, bool predicate) {
  return unsigned(meet(at, mask, predicate, Grid::thread->lane));
}

uint64_t shuffle(Primitive at, unsigned mask, uint64_t value, int source) {
  return meet(at, mask, value, unsigned(source));
}

int shuffle_source(Primitive at, int argument, int width) {
  const Thread& self = *Grid::thread;
  if (width <= 0 || width > warpSize || (width & (width - 1)))
    fail(self, std::string(name_of(at)) + " with a width of " + std::to_string(width));
  const int lane = int(self.lane), first = lane & -width, last = first + width - 1;
  switch (at) {
    case Primitive::shfl:
      return first + (argument & (width - 1));
    case Primitive::shfl_up:
      return lane - argument < first ? lane : lane - argument;
    case Primitive::shfl_down:
      return lane + argument > last ? lane : lane + argument;
    default:
      return (lane ^ argument) > last ? lane : lane ^ argument;
  }
}

void maybe_switch() {
  if (Grid::current != nullptr) Grid::current->maybe_switch();
}

void* shared_memory() { return Grid::thread->block->memory.data(); }

unsigned cluster_rank() { return Grid::thread->block->rank; }

unsigned cluster_size() { return unsigned(Grid::thread->block->cluster.blocks.size()); }

void cluster_arrive() {
  Thread& self = *Grid::thread;
  Cluster& cluster = self.block->cluster;
  if (self.arrived) fail(self, "cluster_arrive twice without cluster_wait");
  self.arrived = true;
  self.phase = cluster.phase;
  ++cluster.arrived;
  complete(cluster);
}

void cluster_wait() {
  Thread& self = *Grid::thread;
  if (!self.arrived) fail(self, "cluster_wait without cluster_arrive");
  self.arrived = false;
  if (self.block->cluster.phase == self.phase) Grid::current->wait(Primitive::cluster_wait);
}

void let_waiting_go_on() {
  if (Grid::current != nullptr) wake_satisfied(Grid::current->waiting);
}

void wait_until(const unsigned* counter, unsigned least) {
  maybe_switch();
  check_aligned(counter, sizeof *counter);
  wait_among(Grid::current->waiting, counter, least);
}

void* map_shared_address(const void* p, unsigned rank) {
  const Thread& self = *Grid::thread;
  const auto& blocks = self.block->cluster.blocks;
  const SharedMemory& mine = self.block->memory;
  if (!mine.holds(p, 0)) fail(self, "map_shared of what is not in the block's shared memory");
  if (rank >= blocks.size())
    fail(self, "map_shared to block " + std::to_string(rank) + " of a cluster of " +
                   std::to_string(blocks.size()));
  if (blocks[rank]->live == 0)
    fail(self, "map_shared to block " + std::to_string(rank) + ", whose threads have all ended");
  return blocks[rank]->memory.data() + (uintptr_t(p) - uintptr_t(mine.data()));
}

void misaligned(const void* p, size_t bytes) {
  char address[32];
  std::snprintf(address, sizeof address, "%p", p);
  const std::string what = std::string(address) + " is not a multiple of the access's " +
                           std::to_string(bytes) + " bytes";
  if (Grid::thread == nullptr) throw std::runtime_error(what);
  fail(*Grid::thread, what);
}

}  // namespace cuda_on_host
