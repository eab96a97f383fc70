// Threads and scratch memory. Work is cut into pieces that do not depend on the number of threads,
// so results do not either.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>

#include "thresholds.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastkd::FASTKD_ISA {

// Orders a thread's streamed stores before whatever it does next.
inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// f(begin, end) for stretches that together are all i < count, by at most `threads` threads.
template <class F>
inline void parallel_stretches(int64_t count, int threads, const F& f) {
#ifdef _OPENMP
  if (threads > count) threads = int(count);
  if (threads > 1) {
    // Without memory for its scratch a thread must say so where the others are waited for.
    std::exception_ptr failed;
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
      try {
        f(count * me / team, count * (me + 1) / team);
      } catch (...) {
#pragma omp critical(fastkd_failed)
        failed = std::current_exception();
      }
      finish_streaming();
    }
    if (failed) std::rethrow_exception(failed);
    return;
  }
#endif
  (void)threads;
  f(int64_t(0), count);
  finish_streaming();
}

// f(i) for every i < count, by at most `threads` threads.
template <class F>
inline void parallel_for(int64_t count, int threads, const F& f) {
  parallel_stretches(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// How many threads are worth waking for so many elements: a wake-up costs a few microseconds.
inline int threads_for(int64_t elements, int available) {
  const int64_t useful = elements / thresholds.per_thread;
  return useful < 2 ? 1 : useful < available ? int(useful) : available;
}

// Memory that a thread keeps between calls, because fresh pages cost more than the work in them.
template <class A>
inline A* scratch(int64_t count) {
  struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  const int64_t bytes = (count * int64_t(sizeof(A)) + 63) / 64 * 64;
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    buffer.data = std::aligned_alloc(64, size_t(bytes));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return static_cast<A*>(buffer.data);
}

// An array for the length of a scope.
template <class A>
class Array {
 public:
  explicit Array(int64_t count)
      : data_(static_cast<A*>(std::malloc(size_t(count > 0 ? count : 1) * sizeof(A)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  A& operator[](int64_t i) { return data_[i]; }
  A* data() { return data_; }

 private:
  A* data_;
};

}  // namespace fastkd::FASTKD_ISA
