// Copies into shared memory that go on behind the thread's back.
#pragma once

#include "cuda_runtime.h"

namespace cuda_on_host {

void copy_async(void* to, const void* from, size_t size, size_t zeros);
void commit_copies();
void wait_for_copies(size_t groups_left);

}  // namespace cuda_on_host

// The last `zeros` bytes are zeroed instead of read.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  cuda_on_host::copy_async(to, from, size, zeros);
}
inline void __pipeline_commit() { cuda_on_host::commit_copies(); }
// CUDA takes more than 8 for 8.
inline void __pipeline_wait_prior(size_t groups) {
  cuda_on_host::wait_for_copies(groups < 8 ? groups : 8);
}
