// Switching between stacks: saves callee-saved registers only, as every switch is a plain function call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)

extern "C" __attribute__((visibility("hidden"))) void rig_switch_stack(void** save, void* to);

namespace rig {

// A stack whose first switch enters `entry`, which must never return.
inline void* prepare_stack(char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>((uintptr_t(top) & ~uintptr_t(63)) - 64);
  memset(frame, 0, 64);
  frame[6] = reinterpret_cast<void*>(entry);
  return frame;
}
inline void switch_stack(void** save, void* to) { rig_switch_stack(save, to); }

}  // namespace rig

#else
#include <ucontext.h>

#include <vector>

// Elsewhere: ucontext, slower (it saves the signal mask by a system call) and needing no assembly.
namespace rig {

inline void* prepare_stack(char* top, void (*entry)()) {
  // The context lies at the top of its own stack, below which it runs.
  char* place = top - ((sizeof(ucontext_t) + 63) / 64) * 64;
  ucontext_t* context = reinterpret_cast<ucontext_t*>(uintptr_t(place) & ~uintptr_t(63));
  getcontext(context);
  constexpr size_t USABLE = 32 << 10;
  context->uc_stack.ss_sp = reinterpret_cast<char*>(context) - USABLE;
  context->uc_stack.ss_size = USABLE;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
inline void switch_stack(void** save, void* to) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

}  // namespace rig
#endif
