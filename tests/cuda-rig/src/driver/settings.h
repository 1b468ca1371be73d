// What the environment asks of the emulation.
//
//   CUDA_EMU_SEED       orders of warps, blocks and streams (1)
//   CUDA_EMU_DEVICES    devices of the machine (2); CUDA_VISIBLE_DEVICES selects among them, as on a real one
//   CUDA_EMU_ARCH       80 or 90: compute capability, shared memory and processors of an A100 or an H100 (80)
//   CUDA_EMU_MEMORY     bytes of each device, with K, M or G behind it (4G); untouched memory costs nothing
//   CUDA_EMU_LAZY_US    how long work may lie in a stream, at most, while nobody waits for it (2000); 0: it
//   runs at once CUDA_EMU_NCCL_SLOW_ABORT   1: aborting an idle communicator takes a second, as measured on
//   an H100 (0) CUDA_EMU_NCCL_GRAPH_HOLD   1: aborting waits while a captured graph holds the communicator
//   (1)
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "api.h"

namespace emu {

struct Settings {
  uint64_t seed;
  std::vector<int> devices;  // the machine's numbers of the visible ones
  int arch;
  size_t memory;
  long lazy_us;
  bool nccl_slow_abort, nccl_graph_hold;

  int processors() const { return arch == 90 ? 132 : 108; }
  // Shared memory of a block beyond 48 KiB, which a kernel must ask for.
  size_t shared_optin() const { return (arch == 90 ? 227 : 163) << 10; }
};

RIG_ACROSS const Settings& settings();

// One line on standard error: what a program did that a real driver would refuse, punish or let pass unseen.
RIG_ACROSS void report(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emu
