// Running a whole grid: what the emulated driver and the kernel harness ask of the runtime.
#pragma once

#include <cstdint>
#include <string>

#include "rig/kernel.h"

namespace rig {

struct Launch {
  Dim3 grid, block;
  size_t shared = 0;  // dynamic shared memory, bytes
};

enum class Fault { None, IllegalAddress, Misaligned, Kernel };

// How a launch ended: the fault, and a report that names kernel, block, thread and address.
struct Outcome {
  Fault fault = Fault::None;
  std::string report;
  explicit operator bool() const { return fault == Fault::None; }
};

// Null if no kernel has this name.
RIG_HIDDEN const Kernel* find_kernel(const char* name);
RIG_HIDDEN const Kernel* first_kernel();

// Bytes of static shared memory of all kernels together. A kernel's own share is only known to the real
// compiler.
RIG_HIDDEN size_t static_shared_bytes();

// Runs the grid to its end on the calling thread, blocks and warps in an order drawn from `seed`.
// One launch at a time in a process.
RIG_HIDDEN Outcome run(const Kernel& kernel, const Launch& launch, void** arguments, uint64_t seed);

// Turns SIGSEGV and SIGBUS of a running kernel into a fault of its launch. `describe` may add what it knows
// of an address (it runs inside a signal handler). Faults elsewhere go to the handler that was there before.
RIG_HIDDEN void catch_faults(void (*describe)(uintptr_t address, char* text, size_t size));
// Every thread that calls `run` needs this once, after catch_faults: a stack for the handler.
RIG_HIDDEN void prepare_thread();

}  // namespace rig
