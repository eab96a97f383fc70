// Fibers: functions that stop in the middle and go on later, all of them on the caller's thread.
#pragma once

#include <cstddef>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_host {

// A place to go on from.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  // What AddressSanitizer is told of the stack.
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

// A stack, and the function that runs on it; `entry` must not throw.
class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void start(void (*entry)());
  void resume();          // returns when the fiber suspends or its function has returned
  static void suspend();  // in a fiber: back to resume()

 private:
  static void main();

  Context context_;
  char* memory_;
  void (*entry_)() = nullptr;
};

}  // namespace cuda_on_host
