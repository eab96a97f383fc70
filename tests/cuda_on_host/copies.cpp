// Copies into shared memory that go on behind the thread's back.
#include <algorithm>

#include "cuda_pipeline.h"
#include "grid.h"

namespace cuda_on_host {
namespace {

// The source is read now and not before, so that it shows where somebody has changed it.
void arrive(const Copy& copy) {
  const size_t read = copy.size - copy.zeros;
  std::memcpy(copy.to, copy.from, read);
  std::memset(copy.to + read, 0, copy.zeros);
}

template <class F>
void arrive_if(Thread& thread, const F& due) {
  auto& copies = thread.copies;
  copies.erase(std::remove_if(copies.begin(), copies.end(),
                              [&](const Copy& copy) {
                                if (!due(copy)) return false;
                                arrive(copy);
                                return true;
                              }),
               copies.end());
}

}  // namespace

void Grid::let_copies_arrive() {
  arrive_if(*thread, [&](const Copy&) { return random.below(copy_delay_) == 0; });
}

void copy_async(void* to, const void* from, size_t size, size_t zeros) {
  Thread& self = *Grid::thread;
  if (size != 4 && size != 8 && size != 16)
    fail(self, "__pipeline_memcpy_async of " + std::to_string(size) + " bytes");
  if (zeros > size)
    fail(self, "__pipeline_memcpy_async zeroes " + std::to_string(zeros) + " of " +
                   std::to_string(size) + " bytes");
  check_aligned(to, size);
  check_aligned(from, size);
  const SharedMemory& memory = self.block->memory;
  if (!memory.holds(to, size))
    fail(self, "__pipeline_memcpy_async to what is not in the block's shared memory");
  if (memory.holds(from, size)) fail(self, "__pipeline_memcpy_async from shared memory");
  std::memset(to, 0xff, size);
  self.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), unsigned(size),
                         unsigned(zeros), self.copy_group});
  Grid::current->let_copies_arrive();
}

void commit_copies() {
  ++Grid::thread->copy_group;
  Grid::current->let_copies_arrive();
}

void wait_for_copies(size_t groups_left) {
  Thread& self = *Grid::thread;
  arrive_if(self, [&](const Copy& copy) { return copy.group + groups_left < self.copy_group; });
}

}  // namespace cuda_on_host
