#include "grid.h"

#include <algorithm>
#include <stdexcept>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {
namespace {

// So many blocks are resident at a time, or one cluster where that is more.
constexpr size_t kResidentBlocks = 4;

// Where clusters are, or blocks in one: x is counted first.
uint3 place(uint64_t number, const dim3& size) {
  return {unsigned(number % size.x), unsigned(number / size.x % size.y),
          unsigned(number / size.x / size.y)};
}

// Fibers of threads that have ended, for the threads to come: to map a stack is slow.
std::vector<std::unique_ptr<Fiber>> idle;

std::unique_ptr<Fiber> take_fiber() {
  if (idle.empty()) return std::make_unique<Fiber>();
  auto fiber = std::move(idle.back());
  idle.pop_back();
  return fiber;
}

}  // namespace

Grid* Grid::current;
Thread* Grid::thread;

SharedMemory::SharedMemory(size_t size)
    : size_(size), data_(static_cast<char*>(operator new(size, std::align_val_t(128)))) {
  std::memset(data_, 0xff, size_);
}

SharedMemory::~SharedMemory() { operator delete(data_, std::align_val_t(128)); }

void SharedMemory::expire() {
  std::memset(data_, 0xff, size_);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(data_, size_);
#endif
}

bool SharedMemory::written_since_expiry() const {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(data_, size_);
#endif
  return std::any_of(data_, data_ + size_, [](char c) { return c != char(0xff); });
}

Thread& Ready::pop(Random& random) {
  const unsigned level = levels - 1 - unsigned(__builtin_clzll(occupied_));
  auto& threads = threads_[level];
  std::swap(threads[random.below(unsigned(threads.size()))], threads.back());
  Thread& thread = *threads.back();
  threads.pop_back();
  if (threads.empty()) occupied_ &= ~(uint64_t(1) << level);
  return thread;
}

Grid::Grid(const Shape& shape, const std::function<void()>& kernel, uint64_t seed)
    : random(seed), shape_(shape), kernel_(kernel) {
  unsigned first = random.below(Ready::levels), second = random.below(Ready::levels);
  if (first > second) std::swap(first, second);
  weight_of_block_ = first;
  weight_of_warp_ = second - first;
  weight_of_thread_ = Ready::levels - 1 - second;
  atomics_to_a_switch_ = 2u << random.below(8);
  copy_delay_ = 1u << 2 * random.below(6);

  to_come_.resize(volume(shape.grid) / volume(shape.cluster));
  for (unsigned i = 0; i < to_come_.size(); ++i) {
    to_come_[i] = i;
    std::swap(to_come_[i], to_come_[random.below(i + 1)]);
  }
}

Grid::~Grid() {
  current = nullptr;
  thread = nullptr;
}

void Grid::run() {
  current = this;
  gridDim = shape_.grid;
  blockDim = shape_.block;
  for (;;) {
    admit();
    if (resident_.empty()) break;
    while (!bulk_copies.empty() && (ready_.empty() || random.below(copy_delay_) == 0))
      let_a_bulk_copy_arrive();
    if (ready_.empty()) report_deadlock();
    thread = &ready_.pop(random);
    threadIdx = thread->index;
    blockIdx = thread->block->index;
    thread->fiber->resume();
    if (failure_) std::rethrow_exception(failure_);
    if (thread->ended) retire(*thread);
  }
}

void Grid::admit() {
  const unsigned size = unsigned(volume(shape_.cluster));
  const dim3 clusters(shape_.grid.x / shape_.cluster.x, shape_.grid.y / shape_.cluster.y,
                      shape_.grid.z / shape_.cluster.z);
  while (!to_come_.empty() &&
         (resident_.empty() || shape_.all_resident || resident_blocks_ + size <= kResidentBlocks)) {
    const uint3 at = place(to_come_.back(), clusters);
    to_come_.pop_back();
    auto cluster = std::make_unique<Cluster>();
    for (unsigned rank = 0; rank < size; ++rank) {
      const uint3 in = place(rank, shape_.cluster);
      const uint3 index = {at.x * shape_.cluster.x + in.x, at.y * shape_.cluster.y + in.y,
                           at.z * shape_.cluster.z + in.z};
      cluster->blocks.push_back(
          std::make_unique<Block>(*cluster, index, rank, shape_.shared_bytes));
      populate(*cluster->blocks.back());
    }
    resident_blocks_ += size;
    resident_.push_back(std::move(cluster));
  }
}

void Grid::populate(Block& block) {
  block.live = unsigned(volume(shape_.block));
  block.cluster.live += block.live;
  block.threads.resize(block.live);
  block.warps.resize((block.live + warpSize - 1) / warpSize);
  for (unsigned i = 0; i < block.live; ++i) {
    Thread& thread = block.threads[i];
    thread.fiber = take_fiber();
    thread.fiber->start(&Grid::thread_main);
    thread.block = &block;
    thread.warp = &block.warps[i / warpSize];
    thread.lane = i % warpSize;
    thread.index = place(i, shape_.block);
    thread.warp->lanes[thread.lane] = &thread;
    thread.warp->live |= 1u << thread.lane;
  }
  draw_levels(block);
  for (Thread& thread : block.threads) ready_.push(thread);
}

void Grid::draw_levels(Block& block) {
  const unsigned of_block = random.below(weight_of_block_ + 1);
  unsigned of_warp = 0;
  for (Thread& thread : block.threads) {
    if (thread.lane == 0) of_warp = random.below(weight_of_warp_ + 1);
    thread.level = of_block + of_warp + random.below(weight_of_thread_ + 1);
  }
}

void Grid::thread_main() {
  try {
    current->kernel_();
  } catch (...) {
    current->failure_ = std::current_exception();
  }
  thread->ended = true;
}

void Grid::wait(Primitive at) {
  thread->waits_at = at;
  Fiber::suspend();
}

void Grid::wake(Thread& thread) {
  thread.waits_at = Primitive::none;
  ready_.push(thread);
}

void Grid::maybe_switch() {
  let_copies_arrive();
  if (random.below(atomics_to_a_switch_) != 0) return;
  thread->level = random.below(Ready::levels);
  ready_.push(*thread);
  Fiber::suspend();
}

void Grid::retire(Thread& thread) {
  Block& block = *thread.block;
  Cluster& cluster = block.cluster;
  idle.push_back(std::move(thread.fiber));
  --block.live;
  --cluster.live;
  leave_meetings(thread);
  if (block.live == 0 && has_bulk_copies(block))
    throw std::runtime_error(name_of(thread) +
                             ": a bulk copy is under way when the block's last thread ends");
  if (block.live == 0) block.memory.expire();
  if (cluster.live > 0) return;
  for (const auto& ended : cluster.blocks)
    if (ended->memory.written_since_expiry())
      throw std::runtime_error(name_of(ended->threads[0]) +
                               ": shared memory was written after the block's last thread ended");
  resident_blocks_ -= cluster.blocks.size();
  resident_.erase(std::find_if(resident_.begin(), resident_.end(),
                               [&](const auto& one) { return one.get() == &cluster; }));
}

void Grid::report_deadlock() const {
  std::string text = "deadlock:";
  for (const auto& cluster : resident_)
    for (const auto& block : cluster->blocks) {
      std::vector<Primitive> told;
      for (const Thread& thread : block->threads) {
        if (thread.ended || std::count(told.begin(), told.end(), thread.waits_at)) continue;
        told.push_back(thread.waits_at);
        const auto waiting = std::count_if(
            block->threads.begin(), block->threads.end(),
            [&](const Thread& one) { return !one.ended && one.waits_at == thread.waits_at; });
        text += "\n  " + name_of(thread) + " waits at " + name_of(thread.waits_at) + " (" +
                std::to_string(waiting) + " of its block's threads)";
      }
    }
  throw std::runtime_error(text);
}

const char* name_of(Primitive primitive) {
  static const char* const names[] = {"nothing",          "__syncthreads",   "__syncthreads_count",
                                      "__syncwarp",       "__shfl_sync",     "__shfl_up_sync",
                                      "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync",
                                      "__any_sync",       "__all_sync",      "cluster_wait",
                                      "wait_for",         "mbarrier_wait"};
  return names[int(primitive)];
}

std::string name_of(const Thread& thread) {
  const auto list = [](const uint3& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) +
           ")";
  };
  return "block " + list(thread.block->index) + ", thread " + list(thread.index);
}

void fail(const Thread& thread, const std::string& what) {
  throw std::runtime_error(name_of(thread) + ": " + what);
}

}  // namespace cuda_on_host
