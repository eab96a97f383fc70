#include "fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// swapcontext would cost two system calls for each switch, to keep a signal mask that never
// changes.
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
.pushsection .text
.globl cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
.popsection
)");
#endif

namespace cuda_on_host {
namespace {

// Address space, of which a fiber touches a page or two. AddressSanitizer reports from the stack
// that it finds, and needs room.
constexpr size_t kStack = 256 << 10;
constexpr size_t kGuard = 4096;

Context home;
Fiber* running;

void switch_context(Context& from, Context& to, bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
#else
  (void)for_good;
#endif
#ifdef __x86_64__
  cuda_on_host_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuard, PROT_NONE);
  memory_ = static_cast<char*>(memory);
  context_.bottom = memory_ + kGuard;
  context_.size = kStack;
}

Fiber::~Fiber() {
#ifdef __SANITIZE_ADDRESS__
  // A fiber that was abandoned leaves the marks of its frames.
  __asan_unpoison_memory_region(memory_ + kGuard, kStack);
#endif
  munmap(memory_, kGuard + kStack);
}

void Fiber::start(void (*entry)()) {
  entry_ = entry;
#ifdef __x86_64__
  // What cuda_on_host_switch pops: six registers and where to return to. Above them, where main's
  // caller would be, is nothing.
  auto* top = reinterpret_cast<uintptr_t*>(memory_ + kGuard + kStack) - 8;
  for (int i = 0; i < 8; ++i) top[i] = 0;
  top[6] = reinterpret_cast<uintptr_t>(&Fiber::main);
  context_.stack_pointer = top;
#else
  getcontext(&context_.registers);
  context_.registers.uc_stack.ss_sp = memory_ + kGuard;
  context_.registers.uc_stack.ss_size = kStack;
  makecontext(&context_.registers, &Fiber::main, 0);
#endif
}

void Fiber::main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &home.bottom, &home.size);
#endif
  running->entry_();
  switch_context(running->context_, home, true);
}

void Fiber::resume() {
  running = this;
  switch_context(home, context_);
}

void Fiber::suspend() { switch_context(running->context_, home); }

}  // namespace cuda_on_host
