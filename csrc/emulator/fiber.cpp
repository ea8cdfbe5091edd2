// The switch between fibers of x86-64, by the System V ABI.
#include "fiber.h"

#ifdef __x86_64__

asm(R"(
.pushsection .text
.globl mmixer_emulator_switch
.hidden mmixer_emulator_switch
.type mmixer_emulator_switch, @function
mmixer_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size mmixer_emulator_switch, . - mmixer_emulator_switch
.popsection
)");

#endif
