// Streams and their executor: one thread runs all streams' work, an op at a time, in a random order that the
// streams' own orders and the events allow.
//
// Work is lazy: while nobody waits for it, an op lies for a random while, so that memory which was given away
// or overwritten too early is still needed when it is. The real driver often finishes before the next call of
// the program; such mistakes then stay unseen for years.
#include <algorithm>
#include <cstring>

#include "../runtime/launch.h"
#include "memory.h"
#include "world.h"

namespace emu {

using Clock = std::chrono::steady_clock;

namespace {

// Never destroyed: the executor outlives main, and a condition variable's destructor waits for its waiters.
struct Executor {
  std::condition_variable work, finished;
  std::vector<Stream*> streams;
  unsigned waiting = 0;     // threads that wait for work to be done
  Stream* focus = nullptr;  // the stream one of them waits for, when its work shall run first
  Clock::time_point hurry_until;
  uint64_t random = 0;
};
Executor& executor() {
  static auto* one = new Executor;
  return *one;
}

bool in_order(const Queued& next) {
  for (auto& [stream, count] : next.after)
    if (stream->done < count) return false;
  return true;
}

// Runs one step of the stream's next op; true if that op is done. The lock is dropped meanwhile.
bool advance(std::unique_lock<std::mutex>& lock, Stream* stream) {
  Queued& next = stream->queue.front();  // references into a deque stay valid while others are put behind
  lock.unlock();
  bool dead = stream->context->sticky != CUDA_SUCCESS;
  bool done = dead || next.op.step();
  lock.lock();
  if (!done) return false;
  Queued ended = std::move(stream->queue.front());
  stream->queue.pop_front();
  stream->done++;
  executor().finished.notify_all();
  lock.unlock();
  ended = {};  // what it held may take the lock
  lock.lock();
  return true;
}

void execute() {
  rig::catch_faults(describe);
  rig::prepare_thread();
  Executor& e = executor();
  std::unique_lock<std::mutex> lock(world());
  unsigned idle = 0;  // rounds in which nothing could go on
  for (;;) {
    std::vector<Stream*> busy;
    auto gone = [](Stream* stream) { return stream->destroyed && stream->queue.empty(); };
    e.streams.erase(std::remove_if(e.streams.begin(), e.streams.end(), gone), e.streams.end());
    for (Stream* stream : e.streams)
      if (!stream->queue.empty()) busy.push_back(stream);
    if (busy.empty()) {
      e.work.wait(lock);
      continue;
    }
    for (size_t i = busy.size(); i > 1; i--) std::swap(busy[i - 1], busy[draw() % i]);
    auto focus = std::find(busy.begin(), busy.end(), e.focus);
    if (focus != busy.end()) std::swap(*focus, busy.front());

    auto now = Clock::now();
    bool demand = e.waiting || now < e.hurry_until;
    auto wake = now + std::chrono::milliseconds(1);
    bool progress = false, polled = false;
    for (Stream* stream : busy) {
      const Queued& next = stream->queue.front();
      if (!in_order(next)) continue;
      if (!demand && now < next.due) {
        wake = std::min(wake, next.due);
        continue;
      }
      polled = true;
      progress = advance(lock, stream);
      if (progress) break;
    }
    idle = progress ? 0 : idle + 1;
    // An op that waits for another process is asked again at once for a while, then ever less often.
    if (progress) continue;
    if (polled && idle < 64) {
      lock.unlock();
      std::this_thread::yield();
      lock.lock();
    } else {
      if (polled) wake = std::min(wake, now + std::chrono::microseconds(50));
      e.work.wait_until(lock, wake);
    }
  }
}

void start_executor() {
  static std::once_flag once;
  std::call_once(once, [] { std::thread(execute).detach(); });
}

// The legacy stream of a context.
Stream* legacy_of(Context* context) {
  static auto* all = new std::vector<Stream*>;
  std::lock_guard<std::mutex> guard(world());
  for (Stream* stream : *all)
    if (stream->context == context) return stream;
  auto* stream = new Stream{};
  stream->context = context;
  stream->legacy = true;
  all->push_back(stream);
  executor().streams.push_back(stream);
  return stream;
}

bool is_legacy(CUstream handle) {
  return !handle || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD;
}

template <class Done>
void wait_until_done(std::unique_lock<std::mutex>& lock, Stream* stream, Done done) {
  Executor& e = executor();
  e.waiting++;
  // Half the time other streams' work stays behind until this one's is done.
  if (draw() & 1 << 20) e.focus = stream;
  e.work.notify_all();
  e.finished.wait(lock, done);
  e.focus = nullptr;
  e.waiting--;
}

}  // namespace

std::mutex& world() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

uint64_t draw() {
  uint64_t& x = executor().random;
  if (!x) x = (settings().seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  x ^= x << 13;
  x ^= x >> 7;
  return x ^= x << 17;
}

Stream* stream_of(CUstream handle) {
  Context* context = current_context();
  if (!context) return nullptr;
  if (is_legacy(handle)) return legacy_of(context);
  std::lock_guard<std::mutex> guard(world());
  auto& all = executor().streams;
  bool known = std::find(all.begin(), all.end(), handle) != all.end() && !handle->destroyed;
  if (!known) report("a stream handle is not of a live stream");
  return known ? handle : nullptr;
}

CUresult put(Stream* stream, Op op) {
  if (CUresult dead = stream->context->sticky) return dead;
  start_executor();
  std::lock_guard<std::mutex> guard(world());
  if (Capture* capture = stream->capture.get()) {
    if (capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    capture->ops.push_back(std::move(op));
    return CUDA_SUCCESS;
  }
  Queued queued{std::move(op), Clock::now(), {}};
  if (long lazy = settings().lazy_us) queued.due += std::chrono::microseconds(draw() % uint64_t(lazy));
  for (Stream* other : executor().streams) {
    if (other->context != stream->context) continue;
    bool ordered = (stream->legacy && other->blocking) || (stream->blocking && other->legacy);
    if (ordered) queued.after.push_back({other, other->put});
  }
  stream->queue.push_back(std::move(queued));
  stream->put++;
  executor().work.notify_all();
  return CUDA_SUCCESS;
}

bool is_capturing(Stream* stream) {
  std::lock_guard<std::mutex> guard(world());
  return stream->capture != nullptr;
}

CUresult wait_for(Stream* stream) {
  std::unique_lock<std::mutex> lock(world());
  uint64_t target = stream->put;
  if (stream->done < target) wait_until_done(lock, stream, [&] { return stream->done >= target; });
  return stream->context->sticky;
}

CUresult wait_for_context(Context* context) {
  std::unique_lock<std::mutex> lock(world());
  std::vector<std::pair<Stream*, uint64_t>> targets;
  for (Stream* stream : executor().streams)
    if (stream->context == context) targets.push_back({stream, stream->put});
  auto done = [&] {
    return std::all_of(targets.begin(), targets.end(),
                       [](auto& one) { return one.first->done >= one.second; });
  };
  if (!done()) wait_until_done(lock, nullptr, done);
  return context->sticky;
}

CUresult wait_for_event(Event* event) {
  std::unique_lock<std::mutex> lock(world());
  uint64_t target = event->recorded;
  auto done = [&] { return event->done >= target || event->context->sticky != CUDA_SUCCESS; };
  if (!done()) wait_until_done(lock, nullptr, done);
  return event->context->sticky;
}

void hurry() {
  std::lock_guard<std::mutex> guard(world());
  executor().hurry_until = Clock::now() + std::chrono::milliseconds(5);
  executor().work.notify_all();
}

CUresult refused_by_capture(Stream* of) {
  std::lock_guard<std::mutex> guard(world());
  bool refused = false;
  for (Stream* stream : executor().streams) {
    Capture* capture = stream->capture.get();
    if (!capture) continue;
    bool hits = of ? stream == of
                   : capture->mode == CAPTURE_GLOBAL || (capture->mode == CAPTURE_THREAD_LOCAL &&
                                                         capture->thread == std::this_thread::get_id());
    if (!hits) continue;
    capture->invalidated = true;
    refused = true;
  }
  return refused ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

void kill_context(Context* context, CUresult why) {
  CUresult none = CUDA_SUCCESS;
  context->sticky.compare_exchange_strong(none, why);
  std::lock_guard<std::mutex> guard(world());
  executor().finished.notify_all();
}

}  // namespace emu

using namespace emu;

static CUresult create_stream(CUstream* out, unsigned flags) {
  RIG_NEEDS_CONTEXT();
  auto* stream = new Stream{};
  stream->context = current_context();
  stream->blocking = !(flags & CU_STREAM_NON_BLOCKING);
  std::lock_guard<std::mutex> guard(world());
  executor().streams.push_back(stream);
  *out = stream;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuStreamCreate(CUstream* out, unsigned flags) { return create_stream(out, flags); }
RIG_API CUresult cuStreamCreateWithPriority(CUstream* out, unsigned flags, int) {
  return create_stream(out, flags);
}

RIG_API CUresult cuStreamDestroy_v2(CUstream handle) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream || is_legacy(handle)) return CUDA_ERROR_INVALID_HANDLE;
  // What is in it still runs; the object is kept for that, the handle is no longer one.
  std::lock_guard<std::mutex> guard(world());
  stream->destroyed = true;
  return CUDA_SUCCESS;
}

RIG_API CUresult cuStreamSynchronize(CUstream handle) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (CUresult refused = refused_by_capture(stream)) return refused;
  if (CUresult refused = refused_by_capture()) return refused;
  return wait_for(stream);
}

RIG_API CUresult cuStreamQuery(CUstream handle) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (CUresult refused = refused_by_capture(stream)) return refused;
  if (CUresult refused = refused_by_capture()) return refused;
  hurry();
  std::lock_guard<std::mutex> guard(world());
  if (CUresult dead = stream->context->sticky) return dead;
  return stream->done >= stream->put ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

RIG_API CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
  {
    std::lock_guard<std::mutex> guard(world());
    Capture* capture = stream->capture.get();
    if (capture && capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (capture && event->recorded && !event->captured) {
      report("a capturing stream waits for an event recorded outside the capture");
      capture->invalidated = true;
      return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (event->captured && !capture) {
      report(
          "a stream would join another one's capture through an event: captures of several streams are not "
          "emulated");
      return CUDA_ERROR_NOT_SUPPORTED;
    }
  }
  uint64_t target = event->recorded;
  return put(stream, {"wait for an event", [=] { return event->done >= target; }, nullptr});
}

RIG_API CUresult cuEventCreate(CUevent* out, unsigned flags) {
  RIG_NEEDS_CONTEXT();
  auto* event = new Event;
  event->context = current_context();
  event->timing = !(flags & 2);
  *out = event;
  return CUDA_SUCCESS;
}
// The object stays: streams may still wait for it.
RIG_API CUresult cuEventDestroy_v2(CUevent event) { return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; }

RIG_API CUresult cuEventRecord(CUevent event, CUstream handle) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->context != stream->context) {
    report("an event of device %d is recorded in a stream of device %d", event->context->ordinal,
           stream->context->ordinal);
    return CUDA_ERROR_INVALID_HANDLE;
  }
  uint64_t number;
  {
    std::lock_guard<std::mutex> guard(world());
    event->captured = stream->capture != nullptr;
    number = event->captured ? uint64_t(event->recorded) : ++event->recorded;
  }
  return put(stream, {"event",
                      [=] {
                        event->done_ns = Clock::now().time_since_epoch().count();
                        if (event->done < number) event->done = number;
                        return true;
                      },
                      nullptr});
}
RIG_API CUresult cuEventRecordWithFlags(CUevent event, CUstream handle, unsigned) {
  return cuEventRecord(event, handle);
}

RIG_API CUresult cuEventQuery(CUevent event) {
  RIG_NEEDS_CONTEXT();
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
  if (CUresult refused = refused_by_capture()) return refused;
  hurry();
  return event->done >= event->recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

RIG_API CUresult cuEventSynchronize(CUevent event) {
  RIG_NEEDS_CONTEXT();
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->captured) return CUDA_ERROR_CAPTURED_EVENT;
  if (CUresult refused = refused_by_capture()) return refused;
  return wait_for_event(event);
}

static CUresult elapsed(float* ms, CUevent start, CUevent end) {
  RIG_NEEDS_CONTEXT();
  if (!start || !end || !start->timing || !end->timing || !start->recorded || !end->recorded)
    return CUDA_ERROR_INVALID_HANDLE;
  if (start->done < start->recorded || end->done < end->recorded) return CUDA_ERROR_NOT_READY;
  *ms = float(end->done_ns - start->done_ns) * 1e-6f;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuEventElapsedTime(float* ms, CUevent start, CUevent end) { return elapsed(ms, start, end); }
RIG_API CUresult cuEventElapsedTime_v2(float* ms, CUevent start, CUevent end) {
  return elapsed(ms, start, end);
}

RIG_API CUresult cuLaunchHostFunc(CUstream handle, void (*function)(void*), void* data) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  return put(stream, {"host function",
                      [=] {
                        function(data);
                        return true;
                      },
                      nullptr});
}
