// Switching between stacks. On x86-64 in a dozen instructions: swapcontext() saves the signal mask, too, by two system calls a
// switch, which took a fifth of the tests' time. Elsewhere ucontext.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastkd::emulator {

#if defined(__x86_64__)

// Of a stack that does not run: everything else that a function may expect to find again lies on top of it.
struct Context {
  void* top = nullptr;
};

// Saves the registers of System V's callee on this stack, and goes on where the other one was left.
void switch_stack(void** from, void* to) asm("fastkd_emulator_switch_stack") __attribute__((visibility("hidden")));
asm(R"(
.text
.weak fastkd_emulator_switch_stack
.hidden fastkd_emulator_switch_stack
.type fastkd_emulator_switch_stack, @function
fastkd_emulator_switch_stack:
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
.size fastkd_emulator_switch_stack, . - fastkd_emulator_switch_stack
)");

// A context that begins with function(), which never returns.
inline void prepare(Context& context, char* stack, std::size_t bytes, void (*function)()) {
  auto* top = reinterpret_cast<uint64_t*>(stack + bytes);  // a multiple of 16
  *--top = 0;                                              // where function() would return to
  *--top = reinterpret_cast<uint64_t>(function);
  for (int i = 0; i < 6; ++i) *--top = 0;
  context.top = top;
}
inline void change(Context& from, Context& to) { switch_stack(&from.top, to.top); }

#else

struct Context {
  ucontext_t context{};
};
inline void prepare(Context& context, char* stack, std::size_t bytes, void (*function)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, function, 0);
  context.context.uc_stack = {};  // else AddressSanitizer clears the shadow of the whole stack at each switch
}
inline void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace fastkd::emulator
