// One block's run, as the grid's loop (launch.cc) sees it.
#pragma once

#include "rig/block.h"

namespace rig {

// Makes what blocks of up to `threads` threads need.
RIG_HIDDEN void prepare_block_runtime(unsigned threads);
RIG_HIDDEN void seed_schedule(uint64_t seed);
// Runs the block that `shape` describes; false if it failed (failure_text says how).
RIG_HIDDEN bool run_block(void (*call)(void**), void** arguments);
RIG_HIDDEN const char* failure_text();

}  // namespace rig
