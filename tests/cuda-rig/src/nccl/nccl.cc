// The emulated NCCL: communicators, their life and death, collectives put into streams.
//
// A dead or stuck peer is never noticed by itself: what waits for it waits until the communicator is aborted,
// as between the GPUs of one machine.
#include <chrono>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "transfer.h"

namespace emu {

namespace {

std::string& error_slot() {
  static auto* text = new std::string;
  return *text;
}
std::mutex& error_lock() {
  static auto* lock = new std::mutex;
  return *lock;
}

void nap() { std::this_thread::sleep_for(std::chrono::microseconds(200)); }

// Calls between ncclGroupStart and ncclGroupEnd of this thread.
struct Group {
  struct Call {
    Transfer transfer;
    Stream* stream;
  };
  int depth = 0;
  std::vector<Call> calls;
};
thread_local Group group;

// The transfers of one communicator in one stream, as one op: point to point all at once, collectives in
// their order.
bool advance_all(std::vector<Transfer>& transfers) {
  bool done = true, earlier_collective = false;
  for (Transfer& transfer : transfers) {
    if (transfer.collective() && earlier_collective) {
      done = false;
      continue;
    }
    advance(transfer);
    done = done && transfer.done;
    earlier_collective = earlier_collective || (transfer.collective() && !transfer.done);
  }
  return done;
}

Result put_transfers(Stream* stream, std::vector<Transfer> transfers) {
  Communicator* comm = transfers.front().comm;
  auto hold = std::make_shared<Hold>(is_capturing(stream) ? comm->graphs : comm->work);
  auto step = [transfers = std::move(transfers)]() mutable { return advance_all(transfers); };
  CUresult error = put(stream, {"NCCL", step, hold});
  if (error)
    return nccl_error(NCCL_UNHANDLED_CUDA_ERROR, "the stream refused a collective: CUDA error %d", error);
  // The first transfer of a non-blocking communicator connects its ranks, in the background.
  if (comm->blocking || comm->connected.exchange(true)) return NCCL_SUCCESS;
  comm->busy_polls = 2;
  return NCCL_IN_PROGRESS;
}

Result close_group() {
  std::vector<Group::Call> calls = std::move(group.calls);
  group.calls.clear();
  Result worst = NCCL_SUCCESS;
  while (!calls.empty()) {
    Stream* stream = calls.front().stream;
    Communicator* comm = calls.front().transfer.comm;
    std::vector<Transfer> together;
    std::vector<Group::Call> rest;
    for (Group::Call& call : calls) {
      if (call.stream == stream && call.transfer.comm == comm)
        together.push_back(call.transfer);
      else
        rest.push_back(call);
    }
    Result result = put_transfers(stream, together);
    if (result != NCCL_SUCCESS && worst != NCCL_UNHANDLED_CUDA_ERROR) worst = result;
    calls = std::move(rest);
  }
  return worst;
}

Result usable(const Communicator* comm, const char* call) {
  if (!comm) return nccl_error(NCCL_INVALID_ARGUMENT, "%s: the communicator is null", call);
  if (comm->ended)
    return nccl_error(NCCL_INVALID_ARGUMENT, "%s: the communicator was destroyed or aborted", call);
  if (comm->aborted) return nccl_error(NCCL_INVALID_USAGE, "%s: the communicator is being aborted", call);
  if (comm->busy_polls || comm->state == NCCL_IN_PROGRESS)
    return nccl_error(NCCL_INVALID_ARGUMENT, "%s: the communicator's last call is still in progress", call);
  if (comm->state != NCCL_SUCCESS) return nccl_error(comm->state, "%s: the communicator has failed", call);
  return NCCL_SUCCESS;
}

Result submit(const char* call, Transfer transfer, CUstream handle) {
  Communicator* comm = transfer.comm;
  if (Result refused = usable(comm, call)) return refused;
  if (!width_of(transfer.type) || transfer.op > NCCL_MIN || transfer.op < NCCL_SUM)
    return nccl_error(NCCL_INVALID_ARGUMENT, "%s: this type or operation is not emulated", call);
  if (transfer.root < 0 || transfer.root >= comm->ranks)
    return nccl_error(NCCL_INVALID_ARGUMENT, "%s: there is no rank %d", call, transfer.root);
  Stream* stream = stream_of(handle);
  if (!stream || stream->context != comm->context)
    return nccl_error(
        NCCL_INVALID_USAGE,
        "%s: the communicator was made on device %d, its stream is on device %d: bind the device to the "
        "thread before making the communicator",
        call, comm->context->ordinal, stream ? stream->context->ordinal : -1);
  group.calls.push_back({transfer, stream});
  return group.depth ? NCCL_SUCCESS : close_group();
}

// Runs until all ranks are there or this one gives up.
void join(Communicator* comm) {
  while (comm->segment->joined < comm->ranks && !comm->aborted) nap();
  unlink_segment(comm->id);
  if (comm->aborted) return;
  for (int rank = 0; rank < comm->ranks; rank++) {
    if (rank == comm->rank || comm->segment->seats[rank].device != comm->segment->seats[comm->rank].device)
      continue;
    comm->state = nccl_error(NCCL_INVALID_USAGE, "ranks %d and %d are on the same device", comm->rank, rank);
    return;
  }
  comm->state = NCCL_SUCCESS;
}

Result init(Communicator** out, int ranks, const NcclId& id, int rank, bool blocking) {
  *out = nullptr;
  if (ranks < 1 || ranks > RANKS_MAX || rank < 0 || rank >= ranks)
    return nccl_error(NCCL_INVALID_ARGUMENT, "rank %d of %d: at most %d ranks are emulated", rank, ranks,
                      RANKS_MAX);
  // The runtime inside the real library falls back to device 0 on a thread that has bound none.
  Context* context = current_context() ? current_context() : context_of(0);
  if (!context) return nccl_error(NCCL_UNHANDLED_CUDA_ERROR, "there is no device");
  Segment* segment = open_segment(id);
  if (!segment)
    return nccl_error(NCCL_SYSTEM_ERROR, "the id is not one of ncclGetUniqueId, or shared memory is refused");
  Seat& seat = segment->seats[rank];
  if (seat.taken.exchange(1))
    return nccl_error(NCCL_INVALID_USAGE, "rank %d has joined before with this id", rank);
  auto* comm = new Communicator;
  comm->segment = segment;
  comm->id = id;
  comm->ranks = ranks;
  comm->rank = rank;
  comm->context = context;
  comm->blocking = blocking;
  seat.device = context->physical;
  segment->joined++;
  *out = comm;
  if (blocking) {
    join(comm);
    return comm->state;
  }
  std::thread(join, comm).detach();
  return NCCL_IN_PROGRESS;
}

// Waits until nothing of the communicator is under way; a graph that holds it counts if asked.
void drain(Communicator* comm, bool graphs) {
  while ((comm->work && !comm->aborted) || (graphs && comm->graphs)) nap();
}

}  // namespace

Result nccl_error(Result result, const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  report("NCCL: %s", text);
  std::lock_guard<std::mutex> guard(error_lock());
  error_slot() = text;
  return result;
}

}  // namespace emu

using namespace emu;
using Comm = Communicator*;

RIG_API Result ncclGetVersion(int* version) {
  *version = 22703;
  return NCCL_SUCCESS;
}
RIG_API Result ncclGetUniqueId(NcclId* id) {
  *id = new_id();
  return NCCL_SUCCESS;
}
RIG_API const char* ncclGetErrorString(Result result) {
  switch (result) {
    case NCCL_SUCCESS:
      return "no error";
    case NCCL_UNHANDLED_CUDA_ERROR:
      return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case NCCL_SYSTEM_ERROR:
      return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case NCCL_INTERNAL_ERROR:
      return "internal error - please report this issue to the NCCL developers";
    case NCCL_INVALID_ARGUMENT:
      return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case NCCL_INVALID_USAGE:
      return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case NCCL_REMOTE_ERROR:
      return "remote process exited or there was a network error";
    case NCCL_IN_PROGRESS:
      return "NCCL operation in progress";
  }
  return "unknown result code";
}
RIG_API const char* ncclGetLastError(Comm) {
  // A copy of this thread's: the text must stay until its next call.
  thread_local std::string text;
  std::lock_guard<std::mutex> guard(error_lock());
  text = error_slot();
  return text.c_str();
}

RIG_API Result ncclCommInitRank(Comm* out, int ranks, NcclId id, int rank) {
  return init(out, ranks, id, rank, true);
}
RIG_API Result ncclCommInitRankConfig(Comm* out, int ranks, NcclId id, int rank, const NcclConfig* config) {
  if (config && config->magic != NCCL_CONFIG_MAGIC)
    return nccl_error(NCCL_INVALID_ARGUMENT, "the configuration was not initialised");
  return init(out, ranks, id, rank, !config || config->blocking != 0);
}

RIG_API Result ncclCommCount(Comm comm, int* count) {
  *count = comm->ranks;
  return NCCL_SUCCESS;
}
RIG_API Result ncclCommUserRank(Comm comm, int* rank) {
  *rank = comm->rank;
  return NCCL_SUCCESS;
}
RIG_API Result ncclCommCuDevice(Comm comm, int* device) {
  *device = comm->context->ordinal;
  return NCCL_SUCCESS;
}
RIG_API Result ncclCommGetAsyncError(Comm comm, Result* state) {
  if (!comm || comm->ended)
    return nccl_error(NCCL_INVALID_ARGUMENT, "the communicator was destroyed or aborted");
  int left = comm->busy_polls;
  while (left > 0 && !comm->busy_polls.compare_exchange_weak(left, left - 1)) {
  }
  *state = left > 0 ? NCCL_IN_PROGRESS : comm->state.load();
  return NCCL_SUCCESS;
}

RIG_API Result ncclCommAbort(Comm comm) {
  if (!comm || comm->ended)
    return nccl_error(NCCL_INVALID_ARGUMENT, "abort: the communicator was destroyed or aborted");
  bool idle = comm->state == NCCL_SUCCESS && !comm->work;
  comm->aborted = true;
  if (settings().nccl_slow_abort && idle) std::this_thread::sleep_for(std::chrono::seconds(1));
  if (settings().nccl_graph_hold) drain(comm, true);
  comm->ended = true;
  return NCCL_SUCCESS;
}
RIG_API Result ncclCommFinalize(Comm comm) {
  if (Result refused = usable(comm, "ncclCommFinalize")) return refused;
  if (comm->blocking) {
    drain(comm, false);
    return NCCL_SUCCESS;
  }
  comm->state = NCCL_IN_PROGRESS;
  std::thread([comm] {
    drain(comm, false);
    comm->state = NCCL_SUCCESS;
  }).detach();
  return NCCL_IN_PROGRESS;
}
RIG_API Result ncclCommDestroy(Comm comm) {
  if (!comm || comm->ended)
    return nccl_error(NCCL_INVALID_ARGUMENT, "destroy: the communicator was destroyed or aborted");
  drain(comm, settings().nccl_graph_hold);
  comm->ended = true;
  return NCCL_SUCCESS;
}

RIG_API Result ncclAllReduce(const void* from, void* to, size_t count, NcclType type, NcclOp op, Comm comm,
                             CUstream stream) {
  Transfer transfer{
      Kind::AllReduce, comm, static_cast<const char*>(from), static_cast<char*>(to), count, type, op};
  return submit("ncclAllReduce", transfer, stream);
}
RIG_API Result ncclAllGather(const void* from, void* to, size_t count, NcclType type, Comm comm,
                             CUstream stream) {
  Transfer transfer{Kind::AllGather,        comm,  static_cast<const char*>(from),
                    static_cast<char*>(to), count, type};
  return submit("ncclAllGather", transfer, stream);
}
RIG_API Result ncclBroadcast(const void* from, void* to, size_t count, NcclType type, int root, Comm comm,
                             CUstream stream) {
  Transfer transfer{
      Kind::Broadcast, comm, static_cast<const char*>(from), static_cast<char*>(to), count, type,
      NCCL_SUM,        root};
  return submit("ncclBroadcast", transfer, stream);
}
RIG_API Result ncclSend(const void* from, size_t count, NcclType type, int peer, Comm comm, CUstream stream) {
  Transfer transfer{Kind::Send, comm, static_cast<const char*>(from), nullptr, count, type, NCCL_SUM, peer};
  return submit("ncclSend", transfer, stream);
}
RIG_API Result ncclRecv(void* to, size_t count, NcclType type, int peer, Comm comm, CUstream stream) {
  Transfer transfer{Kind::Receive, comm, nullptr, static_cast<char*>(to), count, type, NCCL_SUM, peer};
  return submit("ncclRecv", transfer, stream);
}

RIG_API Result ncclGroupStart() {
  group.depth++;
  return NCCL_SUCCESS;
}
RIG_API Result ncclGroupEnd() {
  if (!group.depth) return nccl_error(NCCL_INVALID_USAGE, "ncclGroupEnd without ncclGroupStart");
  return --group.depth ? NCCL_SUCCESS : close_group();
}
