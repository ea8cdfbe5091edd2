// A fiber's registers and stack, and the switch from one fiber to another: by assembly on x86-64
// (fiber.cpp), without ucontext's system call per switch, elsewhere by ucontext.
#pragma once

#include <cstddef>

#ifdef __x86_64__
// Saves what the ABI has a callee keep, and the stack pointer in *from; then goes on from `to`.
extern "C" void mmixer_emulator_switch(void** from, void* to);
#else
#include <ucontext.h>
#endif

namespace mmixer::cuda::emulator {

#ifdef __x86_64__
class Context {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    constexpr int saved_registers = 6;
    void** top = reinterpret_cast<void**>(stack + size - 64);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - saved_registers;
  }

  void switch_to(Context& other) { mmixer_emulator_switch(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};
#else
class Context {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_ = {};
};
#endif

}  // namespace mmixer::cuda::emulator
