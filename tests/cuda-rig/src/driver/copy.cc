// Allocation, copies and fills.
//
// Copies happen when the stream comes to them: pinned memory is read and written then, device memory is
// looked up again then. Pageable memory behaves as documented: a source is staged at the call, a destination
// is complete at its return.
#include <cstring>
#include <string>

#include "memory.h"
#include "world.h"

namespace emu {

namespace {

enum class Side { Host, Device };

struct Range {
  void* address;
  Side side;
  bool live(size_t bytes) const { return side == Side::Host || is_live(Place::Device, address, bytes); }
};

// The destination and source are still there when the copy's turn comes; else the context dies, as it would.
bool still_there(Stream* stream, const char* what, Range to, Range from, size_t bytes) {
  for (const Range& range : {to, from}) {
    if (range.live(bytes)) continue;
    char where[256] = "";
    describe(uintptr_t(range.address), where, sizeof where);
    report("%s of %zu bytes: device memory %p was freed while the copy was in its stream%s", what, bytes,
           range.address, where);
    kill_context(stream->context, CUDA_ERROR_ILLEGAL_ADDRESS);
    return false;
  }
  return true;
}

CUresult copy(CUstream handle, const char* what, Range to, Range from, size_t bytes) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!bytes) return CUDA_SUCCESS;
  for (const Range& range : {to, from}) {
    if (range.live(bytes)) continue;
    report("%s of %zu bytes: %p is not wholly in one live device allocation", what, bytes, range.address);
    return CUDA_ERROR_INVALID_VALUE;
  }
  bool capturing = is_capturing(stream);
  bool staged = from.side == Side::Host && !is_live(Place::Pinned, from.address, bytes) && !capturing;
  std::shared_ptr<std::string> stage;
  if (staged) stage = std::make_shared<std::string>(static_cast<char*>(from.address), bytes);
  auto step = [=] {
    if (!still_there(stream, what, to, from, bytes)) return true;
    memcpy(to.address, stage ? stage->data() : from.address, bytes);
    return true;
  };
  if (CUresult error = put(stream, {what, step, stage})) return error;
  bool waits = to.side == Side::Host && !is_live(Place::Pinned, to.address, bytes) && !capturing;
  return waits ? wait_for(stream) : CUDA_SUCCESS;
}

CUresult copy_and_wait(const char* what, Range to, Range from, size_t bytes) {
  RIG_NEEDS_CONTEXT();
  if (CUresult refused = refused_by_capture()) return refused;
  if (CUresult error = copy(nullptr, what, to, from, bytes)) return error;
  return wait_for(stream_of(nullptr));
}

Range device(CUdeviceptr address) { return {reinterpret_cast<void*>(address), Side::Device}; }
Range host(const void* address) { return {const_cast<void*>(address), Side::Host}; }

CUresult fill(CUstream handle, CUdeviceptr to, uint32_t value, unsigned width, size_t count) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!count) return CUDA_SUCCESS;
  if (to % width || !is_live(Place::Device, reinterpret_cast<void*>(to), count * width)) {
    report("memset of %zu bytes: %p is misaligned or not wholly in one live device allocation", count * width,
           reinterpret_cast<void*>(to));
    return CUDA_ERROR_INVALID_VALUE;
  }
  Range range = device(to);
  return put(stream, {"memset",
                      [=] {
                        if (!still_there(stream, "memset", range, range, count * width)) return true;
                        char* at = static_cast<char*>(range.address);
                        for (size_t i = 0; i < count; i++, at += width) memcpy(at, &value, width);
                        return true;
                      },
                      nullptr});
}

CUresult fill_and_wait(CUdeviceptr to, uint32_t value, unsigned width, size_t count) {
  RIG_NEEDS_CONTEXT();
  if (CUresult refused = refused_by_capture()) return refused;
  if (CUresult error = fill(nullptr, to, value, width, count)) return error;
  return wait_for(stream_of(nullptr));
}

CUresult allocate(void** out, Place place, size_t bytes) {
  RIG_NEEDS_CONTEXT();
  if (CUresult refused = refused_by_capture()) return refused;
  if (!bytes) return CUDA_ERROR_INVALID_VALUE;
  void* start = take(place, current_context(), bytes);
  if (!start) return CUDA_ERROR_OUT_OF_MEMORY;
  *out = start;
  return CUDA_SUCCESS;
}

// Frees after all work of the device, as the driver does.
CUresult release(Place place, void* start, const char* what) {
  RIG_NEEDS_CONTEXT();
  if (!start && place == Place::Device) return CUDA_SUCCESS;
  if (CUresult refused = refused_by_capture()) return refused;
  wait_for_context(current_context());
  if (give_back(place, start)) return current_context()->sticky;
  report("%s of %p, which is not a live allocation", what, start);
  return CUDA_ERROR_INVALID_VALUE;
}

}  // namespace
}  // namespace emu

using namespace emu;

RIG_API CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  RIG_NEEDS_CONTEXT();
  *total = settings().memory;
  *free_bytes = *total - used_bytes(current_context());
  return CUDA_SUCCESS;
}
RIG_API CUresult cuMemAlloc_v2(CUdeviceptr* out, size_t bytes) {
  return allocate(reinterpret_cast<void**>(out), Place::Device, bytes);
}
RIG_API CUresult cuMemFree_v2(CUdeviceptr start) {
  return release(Place::Device, reinterpret_cast<void*>(start), "cuMemFree");
}
RIG_API CUresult cuMemAllocAsync(CUdeviceptr* out, size_t bytes, CUstream handle) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (is_capturing(stream)) {
    report("cuMemAllocAsync in a capture (a memory node) is not emulated");
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  return allocate(reinterpret_cast<void**>(out), Place::Device, bytes);
}
RIG_API CUresult cuMemFreeAsync(CUdeviceptr start, CUstream handle) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  void* address = reinterpret_cast<void*>(start);
  if (!is_live(Place::Device, address, 1)) return CUDA_ERROR_INVALID_VALUE;
  return put(stream, {"free",
                      [=] {
                        if (!give_back(Place::Device, address)) {
                          report("cuMemFreeAsync of %p, which was freed before", address);
                          kill_context(stream->context, CUDA_ERROR_INVALID_VALUE);
                        }
                        return true;
                      },
                      nullptr});
}
RIG_API CUresult cuMemHostAlloc(void** out, size_t bytes, unsigned) {
  return allocate(out, Place::Pinned, bytes);
}
RIG_API CUresult cuMemAllocHost_v2(void** out, size_t bytes) { return allocate(out, Place::Pinned, bytes); }
RIG_API CUresult cuMemFreeHost(void* start) { return release(Place::Pinned, start, "cuMemFreeHost"); }
RIG_API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* out, void* start, unsigned) {
  RIG_NEEDS_CONTEXT();
  if (!is_live(Place::Pinned, start, 1)) return CUDA_ERROR_INVALID_VALUE;
  *out = CUdeviceptr(start);
  return CUDA_SUCCESS;
}
RIG_API CUresult cuMemHostRegister_v2(void* start, size_t bytes, unsigned) {
  RIG_NEEDS_CONTEXT();
  if (!start || !bytes) return CUDA_ERROR_INVALID_VALUE;
  return pin(start, bytes) ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
}
RIG_API CUresult cuMemHostUnregister(void* start) {
  RIG_NEEDS_CONTEXT();
  wait_for_context(current_context());
  return unpin(start) ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

RIG_API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return copy(stream, "copy to the device", device(to), host(from), bytes);
}
RIG_API CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy(stream, "copy to the host", host(to), device(from), bytes);
}
RIG_API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return copy(stream, "copy on the device", device(to), device(from), bytes);
}
RIG_API CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes,
                                   CUstream stream) {
  return copy(stream, "copy between devices", device(to), device(from), bytes);
}
RIG_API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
  return copy_and_wait("copy to the device", device(to), host(from), bytes);
}
RIG_API CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
  return copy_and_wait("copy to the host", host(to), device(from), bytes);
}
RIG_API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return copy_and_wait("copy on the device", device(to), device(from), bytes);
}

RIG_API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  return fill(stream, to, value, 1, count);
}
RIG_API CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
  return fill(stream, to, value, 2, count);
}
RIG_API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  return fill(stream, to, value, 4, count);
}
RIG_API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
  return fill_and_wait(to, value, 1, count);
}
RIG_API CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
  return fill_and_wait(to, value, 4, count);
}
