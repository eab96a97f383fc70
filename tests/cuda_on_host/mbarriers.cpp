// mbarriers, which count bytes as they arrive in shared memory, and the bulk copies and messages
// that bring them.
#include <algorithm>

#include "grid.h"

namespace cuda_on_host {
namespace {

// What a kernel keeps for the chip, in 8 bytes of shared memory.
struct Mbarrier {
  int32_t bytes;  // expected and not arrived; less than 0 where they came before they were expected
  uint16_t phase;
  uint8_t threads, pending;  // that arrive in each phase, and that have not yet

  // Shared memory that nobody has written holds ones.
  bool is_initialised() const { return 0 < threads && threads < 0xff; }
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

Mbarrier& mbarrier_at(const uint64_t* address, const char* doing) {
  const Thread& self = *Grid::thread;
  check_aligned(address, sizeof *address);
  if (!self.block->memory.holds(address, sizeof *address))
    fail(self, std::string(doing) + " of what is not in the block's shared memory");
  auto& barrier = *reinterpret_cast<Mbarrier*>(const_cast<uint64_t*>(address));
  if (!barrier.is_initialised()) fail(self, std::string(doing) + " before mbarrier_init");
  return barrier;
}

bool is_complete(const Mbarrier& barrier, unsigned parity) { return barrier.phase % 2 != parity; }

void complete(Mbarrier& barrier, Block& block) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.threads;
  for (Thread& thread : block.threads)
    if (thread.waits_at == Primitive::mbarrier_wait &&
        thread.mbarrier == reinterpret_cast<uint64_t*>(&barrier) &&
        is_complete(barrier, thread.parity))
      Grid::current->wake(thread);
}

}  // namespace

void mbarrier_init(uint64_t* address, unsigned threads) {
  maybe_switch();
  const Mbarrier initial{0, 0, uint8_t(threads), uint8_t(threads)};
  std::memcpy(address, &initial, sizeof initial);
  mbarrier_at(address, "mbarrier_init");
}

void mbarrier_expect(uint64_t* address, unsigned bytes) {
  maybe_switch();
  Mbarrier& barrier = mbarrier_at(address, "mbarrier_expect");
  if (barrier.pending == 0) fail(*Grid::thread, "mbarrier_expect twice in a phase");
  --barrier.pending;
  barrier.bytes += int32_t(bytes);
  complete(barrier, *Grid::thread->block);
}

void mbarrier_wait(const uint64_t* address, unsigned parity) {
  maybe_switch();
  Thread& self = *Grid::thread;
  const Mbarrier& barrier = mbarrier_at(address, "mbarrier_wait");
  if (is_complete(barrier, parity)) return;
  self.mbarrier = address;
  self.parity = parity;
  Grid::current->wait(Primitive::mbarrier_wait);
}

void copy_bulk(void* to, const void* from, size_t bytes, uint64_t* address) {
  constexpr size_t unit = 16;
  Thread& self = *Grid::thread;
  mbarrier_at(address, "copy_bulk");
  if (bytes == 0 || bytes % unit != 0)
    fail(self, "copy_bulk of " + std::to_string(bytes) + " bytes");
  check_aligned(to, unit);
  check_aligned(from, unit);
  const SharedMemory& memory = self.block->memory;
  if (!memory.holds(to, bytes)) fail(self, "copy_bulk to what is not in the block's shared memory");
  if (memory.holds(from, bytes)) fail(self, "copy_bulk from shared memory");
  std::memset(to, 0xff, bytes);
  Grid::current->bulk_copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), {}, bytes, address, self.block});
  ++bulk_copies_begun;
}

uint64_t bulk_copies_begun = 0;

void store_async_bytes(void* to, const void* message, size_t bytes, uint64_t* address,
                       unsigned rank) {
  constexpr size_t unit = 16;
  maybe_switch();
  Thread& self = *Grid::thread;
  mbarrier_at(address, "store_async");
  if (bytes % unit != 0) fail(self, "store_async of " + std::to_string(bytes) + " bytes");
  check_aligned(to, unit);
  auto* const there = static_cast<char*>(map_shared_address(to, rank));
  auto* const mbarrier = static_cast<uint64_t*>(map_shared_address(address, rank));
  if (!reinterpret_cast<Mbarrier*>(mbarrier)->is_initialised())
    fail(self, "store_async before the other block's mbarrier_init");
  const auto* const first = static_cast<const char*>(message);
  Grid::current->bulk_copies.push_back({there,
                                        nullptr,
                                        {first, first + bytes},
                                        bytes,
                                        mbarrier,
                                        self.block->cluster.blocks[rank].get()});
}

// The source is read now and not before, so that it shows where somebody has changed it.
void Grid::let_a_bulk_copy_arrive() {
  std::swap(bulk_copies[random.below(unsigned(bulk_copies.size()))], bulk_copies.back());
  const BulkCopy copy = std::move(bulk_copies.back());
  bulk_copies.pop_back();
  std::memcpy(copy.to, copy.from != nullptr ? copy.from : copy.message.data(), copy.size);
  auto& barrier = *reinterpret_cast<Mbarrier*>(copy.mbarrier);
  barrier.bytes -= int32_t(copy.size);
  complete(barrier, *copy.block);
}

bool Grid::has_bulk_copies(const Block& block) const {
  return std::any_of(bulk_copies.begin(), bulk_copies.end(),
                     [&](const BulkCopy& copy) { return copy.block == &block; });
}

}  // namespace cuda_on_host
