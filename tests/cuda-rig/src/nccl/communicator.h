// A communicator: one rank's seat in a segment, and what holds it.
#pragma once

#include <atomic>
#include <memory>

#include "../driver/world.h"
#include "segment.h"

namespace emu {

struct Communicator {
  Segment* segment = nullptr;
  NcclId id;
  int ranks = 0, rank = 0;
  Context* context = nullptr;  // the device it is bound to: the one current when it was made
  bool blocking = true;
  std::atomic<Result> state{NCCL_IN_PROGRESS};
  std::atomic<bool> aborted{false}, ended{false};
  std::atomic<int> work{0};    // collectives put and not finished
  std::atomic<int> graphs{0};  // captured collectives in graphs that live
  std::atomic<bool> connected{false};
  std::atomic<int> busy_polls{0};  // state queries that still say "in progress"
  uint64_t round = 0;              // executor only
  std::atomic<bool> mismatched{false};
};

// One of the two counters above, while it lives.
class Hold {
 public:
  explicit Hold(std::atomic<int>& counter) : counter_(counter) { counter_++; }
  ~Hold() { counter_--; }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  std::atomic<int>& counter_;
};

// Sets the text that ncclGetLastError gives, reports it, and gives the result back.
Result nccl_error(Result result, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace emu
