// The objects behind the driver's handles, and the one lock over them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "api.h"
#include "settings.h"

namespace emu {

struct Context {
  int ordinal;   // among the visible devices
  int physical;  // the machine's number
  int retained = 0;
  // A fault of a kernel kills its context: every later call gives this result until the process ends.
  std::atomic<CUresult> sticky{CUDA_SUCCESS};
};

// One piece of a stream's work.
struct Op {
  const char* name;
  // Called on the executor's thread once all that was put before it is done; false: not yet, call again. A
  // captured op is copied for each replay before its first step, with the state its lambda holds.
  std::function<bool()> step;
  // Kept alive as long as the op, or a graph that holds a copy, is.
  std::shared_ptr<void> hold;
};

struct Capture {
  CUstreamCaptureMode mode;
  std::thread::id thread;
  bool invalidated = false;
  std::vector<Op> ops;
};

struct Queued {
  Op op;
  std::chrono::steady_clock::time_point due;        // may lie until then while nobody waits
  std::vector<std::pair<Stream*, uint64_t>> after;  // implicit order with the legacy stream
};

struct Stream {
  Context* context;
  bool legacy = false;
  bool blocking = false;  // ordered with the legacy stream
  bool destroyed = false;
  std::deque<Queued> queue;
  uint64_t put = 0;  // ops ever put, and ever done
  std::atomic<uint64_t> done{0};
  std::unique_ptr<Capture> capture;
};

struct Event {
  std::atomic<uint64_t> recorded{0}, done{0};
  std::atomic<int64_t> done_ns{0};
  Context* context;
  bool timing;
  bool captured = false;  // last recorded inside a capture
};

struct Graph {
  std::vector<Op> ops;
};
struct Executable {
  std::vector<Op> ops;
};

// Over streams, events, captures. Never held while an op's step runs, nor while memory is looked up.
RIG_ACROSS std::mutex& world();
RIG_ACROSS uint64_t draw();  // needs the lock

RIG_ACROSS Context* current_context();
void set_current_context(Context* context);
// The context of a visible device; null if there is none.
RIG_ACROSS Context* context_of(int ordinal);
std::vector<Context*>& contexts();

// The stream of a handle for the calling thread; null if the handle is not one, or the thread has no context.
RIG_ACROSS Stream* stream_of(CUstream handle);

// Puts an op at a stream's end, or into its capture.
RIG_ACROSS CUresult put(Stream* stream, Op op);
RIG_ACROSS bool is_capturing(Stream* stream);

// Waits until all that is in the stream now is done. For calls that a capture forbids, ask
// `refused_by_capture` first.
CUresult wait_for(Stream* stream);
CUresult wait_for_context(Context* context);
CUresult wait_for_event(Event* event);
// Somebody polls: work goes on without delay for a while.
void hurry();

// A call that may not happen during a capture, of the given stream (it alone) or of any this thread must
// respect. Gives 900 and invalidates the capture, as the real driver does.
CUresult refused_by_capture(Stream* stream = nullptr);

// A fault on the device.
RIG_ACROSS void kill_context(Context* context, CUresult why);

}  // namespace emu

#define RIG_NEEDS_CONTEXT()                                       \
  if (!emu::current_context()) return CUDA_ERROR_INVALID_CONTEXT; \
  if (CUresult dead = emu::current_context()->sticky) return dead
