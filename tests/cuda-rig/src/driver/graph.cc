// Capture of one stream into a graph, and its replay.
//
// As measured on an H100: a call that a capture forbids gives 900 and invalidates it; the next launch into it
// and its end then give 901, and after that end the stream is usable again.
#include <memory>

#include "world.h"

using namespace emu;

RIG_API CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  std::lock_guard<std::mutex> guard(world());
  if (stream->capture) return CUDA_ERROR_INVALID_VALUE;
  stream->capture = std::make_unique<Capture>();
  stream->capture->mode = mode;
  stream->capture->thread = std::this_thread::get_id();
  return CUDA_SUCCESS;
}

RIG_API CUresult cuStreamEndCapture(CUstream handle, CUgraph* out) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  std::unique_ptr<Capture> capture;
  {
    std::lock_guard<std::mutex> guard(world());
    if (!stream->capture) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    if (stream->capture->mode != CAPTURE_RELAXED && stream->capture->thread != std::this_thread::get_id())
      return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    capture = std::move(stream->capture);
  }
  *out = nullptr;
  if (capture->invalidated) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  *out = new Graph{std::move(capture->ops)};
  return CUDA_SUCCESS;
}

RIG_API CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  std::lock_guard<std::mutex> guard(world());
  *status = !stream->capture               ? CAPTURE_NONE
            : stream->capture->invalidated ? CAPTURE_INVALIDATED
                                           : CAPTURE_ACTIVE;
  return CUDA_SUCCESS;
}

RIG_API CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  thread_local CUstreamCaptureMode held = CAPTURE_GLOBAL;
  std::swap(*mode, held);
  return CUDA_SUCCESS;
}

RIG_API CUresult cuGraphInstantiateWithFlags(CUgraphExec* out, CUgraph graph, unsigned long long) {
  RIG_NEEDS_CONTEXT();
  if (!graph) return CUDA_ERROR_INVALID_VALUE;
  *out = new Executable{graph->ops};
  return CUDA_SUCCESS;
}

RIG_API CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream || !executable) return CUDA_ERROR_INVALID_HANDLE;
  for (const Op& op : executable->ops)
    if (CUresult error = put(stream, op)) return error;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuGraphUpload(CUgraphExec executable, CUstream) {
  return executable ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

RIG_API CUresult cuGraphGetNodes(CUgraph graph, void** nodes, size_t* count) {
  // Only the count is known by number; there is nothing that a program could do with a node here.
  if (!graph || nodes) return CUDA_ERROR_NOT_SUPPORTED;
  *count = graph->ops.size();
  return CUDA_SUCCESS;
}

// What the ops hold is let go here, or when the last replay that is under way ends.
RIG_API CUresult cuGraphDestroy(CUgraph graph) {
  delete graph;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuGraphExecDestroy(CUgraphExec executable) {
  delete executable;
  return CUDA_SUCCESS;
}
