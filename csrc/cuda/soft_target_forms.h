// The forms that a call on logits can take, and how they are launched: rows on the chip, columns
// (contiguous rows, classes apart), a stream of classes; with several teachers short and long
// rows, or two passes. These have forward KL at one number for a temperature; one general form has
// the rest.
#pragma once

#include <algorithm>

#include "soft_target_row.h"
#include "soft_target_vectors.h"
#include "soft_target_write.h"

namespace fastkd::cuda::logits {

// The memory that a launch brings: for the partial sums of its blocks, and a ticket counter.
struct Scratch {
  unsigned* counter;
  Tickets tickets(const Call& call, const Stream& stream) const {
    return call.sums_losses() ? grid_counters.take(stream, counter) : Tickets{};
  }
};

// Fills memory with zeros, if there is any.
inline void clear(void* p, int64_t elements, DType dtype, const Stream& stream) {
  if (p != nullptr && elements > 0)
    check(cudaMemsetAsync(p, 0, size_t(elements * size_of(dtype)), stream.handle), "clearing");
}

// Gives a call its place for the partial sums of blocks, and counts its labels where they are many.
Scratch prepare(Call& call, void* scratch, const Stream& stream);

// The largest blocks and clusters that have a row.
constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr int kMostCluster = 16;
struct Blocks {
  int threads, cluster;
};

// What a launch shares out. As parameters these take no registers.
struct Share {
  int all;      // vectors of a row
  int vectors;  // of these to each block, or warp
  int blocks;   // to a row
  uint32_t teams;
};

// The columns form knows no float64, and neither do rows: few classes, short and long ones, which
// return whether they have served the call.
void launch_columns(const Call& call, const Scratch& scratch, const Stream& stream);
bool launch_few(const Call& call, const Scratch& scratch, const Stream& stream);
bool launch_short_rows(const Call& call, const Scratch& scratch, const Stream& stream);
bool launch_long_rows(const Call& call, const Scratch& scratch, const Stream& stream);
void launch_stream(const Call& call, const Scratch& scratch, const Stream& stream);
void launch_backward(const Call& call, bool are_columns, const Stream& stream);

struct MeanCall;
bool launch_teachers_short_rows(const MeanCall& of, const Scratch& scratch, const Stream& stream);
bool launch_teachers_long_rows(const MeanCall& of, const Scratch& scratch, const Stream& stream);
void launch_passes(const MeanCall& of, bool are_columns, const Scratch& scratch,
                   const Stream& stream);

struct GeneralCall;
void launch_general(const GeneralCall& of, bool are_columns, const Scratch& scratch,
                    const Stream& stream);

// f(a divergence, null pointers of the two storage types). Pairs of one dtype have kernels of their
// own; float64 is not among them.
template <class F>
auto with_types_of(const Call& call, const F& f) {
  return with_divergence(call.divergence, [&](auto divergence) {
    const DType one = call.sides[kStudent].dtype, other = call.sides[kTeacher].dtype;
    if (one != other || call.is_double)
      return f(divergence, static_cast<Any*>(nullptr), static_cast<Any*>(nullptr));
    return with_storage(one, [&](auto* storage) { return f(divergence, storage, storage); });
  });
}

// A kernel's shared memory that is one struct, in bytes; what follows it is aligned.
template <class Shared>
constexpr size_t kHeader = (sizeof(Shared) + 127) / 128 * 128;
template <class T, class Shared>
__device__ __forceinline__ T* after(Shared& shared) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(&shared) + kHeader<Shared>);
}

}  // namespace fastkd::cuda::logits
