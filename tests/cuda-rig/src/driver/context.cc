// Devices, contexts, versions and errors' names.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "memory.h"
#include "world.h"

namespace emu {

namespace {
thread_local Context* current = nullptr;
std::atomic<bool> initialised{false};
}  // namespace

Context* current_context() { return current; }
void set_current_context(Context* context) { current = context; }

std::vector<Context*>& contexts() {
  static auto* all = [] {
    auto* made = new std::vector<Context*>;
    for (int physical : settings().devices) {
      auto* context = new Context;
      context->ordinal = int(made->size());
      context->physical = physical;
      made->push_back(context);
    }
    return made;
  }();
  return *all;
}

Context* context_of(int ordinal) {
  if (ordinal < 0 || size_t(ordinal) >= contexts().size()) return nullptr;
  return contexts()[size_t(ordinal)];
}

namespace {

int attribute(int number, const Context& device) {
  const Settings& s = settings();
  switch (number) {
    case 1:
    case 2:
    case 3:
      return 1024;  // threads of a block: all, x, y
    case 4:
      return 64;  // z
    case 5:
      return 0x7fffffff;  // blocks of a grid: x
    case 6:
    case 7:
      return 65535;  // y, z
    case 8:
      return 48 << 10;  // shared memory of a block
    case 10:
      return 32;  // warp
    case 12:
      return 65536;  // registers of a block
    case 13:
      return s.arch == 90 ? 1980000 : 1410000;  // kHz
    case 16:
      return s.processors();
    case 31:
    case 41:
    case 32:
      return 1;  // concurrent kernels, unified addresses, ECC
    case 33:
      return 0x10 + device.physical;  // PCI bus
    case 36:
      return s.arch == 90 ? 2619000 : 1593000;  // memory, kHz
    case 37:
      return 5120;  // memory bus, bits
    case 38:
      return (s.arch == 90 ? 50 : 40) << 20;  // second-level cache
    case 39:
      return 2048;  // threads of a processor
    case 40:
      return 3;  // copy engines
    case 75:
      return s.arch / 10;
    case 76:
      return s.arch % 10;
    case 81:
      return int(s.shared_optin() + 1024);  // shared memory of a processor
    case 82:
      return 65536;  // registers of a processor
    case 97:
      return int(s.shared_optin());
    case 115:
      return 1;  // memory pools
    default:
      return 0;
  }
}

struct ErrorText {
  const char *name, *text;
};
const ErrorText* error_text(CUresult error) {
  static const std::map<int, ErrorText> all = {
      {0, {"CUDA_SUCCESS", "no error"}},
      {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
      {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
      {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
      {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
      {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
      {200, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
      {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
      {209, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
      {301, {"CUDA_ERROR_FILE_NOT_FOUND", "file not found"}},
      {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
      {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
      {600, {"CUDA_ERROR_NOT_READY", "device not ready"}},
      {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
      {701, {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"}},
      {704, {"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"}},
      {705, {"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED", "peer access has not been enabled"}},
      {712,
       {"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        "part or all of the requested memory range is already mapped"}},
      {713,
       {"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        "pointer does not correspond to a registered memory region"}},
      {716, {"CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"}},
      {719, {"CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"}},
      {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
      {900, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
      {901,
       {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"}},
      {903, {"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not initiated in this stream"}},
      {905,
       {"CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"}},
      {906,
       {"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
        "operation would make the legacy stream depend on a capturing blocking stream"}},
      {907,
       {"CUDA_ERROR_CAPTURED_EVENT",
        "operation not permitted on an event last recorded in a capturing stream"}},
      {908,
       {"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
        "attempt to terminate a thread-local capture sequence from another thread"}},
  };
  auto found = all.find(error);
  return found == all.end() ? nullptr : &found->second;
}

}  // namespace
}  // namespace emu

using namespace emu;

#define RIG_NEEDS_INIT() \
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED

RIG_API CUresult cuInit(unsigned flags) {
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (contexts().empty()) return CUDA_ERROR_NO_DEVICE;
  initialised = true;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDriverGetVersion(int* version) {
  *version = 12090;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuGetErrorName(CUresult error, const char** text) {
  const ErrorText* found = error_text(error);
  *text = found ? found->name : nullptr;
  return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
RIG_API CUresult cuGetErrorString(CUresult error, const char** text) {
  const ErrorText* found = error_text(error);
  *text = found ? found->text : nullptr;
  return found ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

RIG_API CUresult cuDeviceGetCount(int* count) {
  RIG_NEEDS_INIT();
  *count = int(contexts().size());
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  RIG_NEEDS_INIT();
  if (!context_of(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  if (!context_of(device)) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(name, size_t(size), "Emulated GPU sm_%d", settings().arch);
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  Context* context = context_of(device);
  if (!context) return CUDA_ERROR_INVALID_DEVICE;
  memset(uuid, 0, sizeof *uuid);
  snprintf(uuid->bytes, sizeof uuid->bytes, "cuda-rig-%d", context->physical);
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }
RIG_API CUresult cuDeviceGetPCIBusId(char* text, int size, CUdevice device) {
  Context* context = context_of(device);
  if (!context) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(text, size_t(size), "0000:%02X:00.0", 0x10 + context->physical);
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  if (!context_of(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = settings().memory;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDeviceGetAttribute(int* value, int number, CUdevice device) {
  Context* context = context_of(device);
  if (!context) return CUDA_ERROR_INVALID_DEVICE;
  *value = attribute(number, *context);
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  if (!context_of(device) || !context_of(peer)) return CUDA_ERROR_INVALID_DEVICE;
  *can = device != peer;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDeviceGetP2PAttribute(int* value, int number, CUdevice device, CUdevice peer) {
  if (!context_of(device) || !context_of(peer) || device == peer) return CUDA_ERROR_INVALID_DEVICE;
  *value = number == 2 || number == 3;  // access and atomics
  return CUDA_SUCCESS;
}

RIG_API CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice device) {
  RIG_NEEDS_INIT();
  Context* context = context_of(device);
  if (!context) return CUDA_ERROR_INVALID_DEVICE;
  if (CUresult dead = context->sticky) return dead;
  context->retained++;
  *out = context;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  Context* context = context_of(device);
  if (!context) return CUDA_ERROR_INVALID_DEVICE;
  if (!context->retained) return CUDA_ERROR_INVALID_CONTEXT;
  context->retained--;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  Context* context = context_of(device);
  if (!context) return CUDA_ERROR_INVALID_DEVICE;
  *flags = 0;
  *active = context->retained > 0;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned) {
  return context_of(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

RIG_API CUresult cuCtxGetCurrent(CUcontext* out) {
  RIG_NEEDS_INIT();
  *out = current_context();
  return CUDA_SUCCESS;
}
RIG_API CUresult cuCtxSetCurrent(CUcontext context) {
  RIG_NEEDS_INIT();
  set_current_context(context);
  return CUDA_SUCCESS;
}
RIG_API CUresult cuCtxGetDevice(CUdevice* device) {
  RIG_NEEDS_CONTEXT();
  *device = current_context()->ordinal;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuCtxSynchronize() {
  RIG_NEEDS_CONTEXT();
  if (CUresult refused = refused_by_capture()) return refused;
  return wait_for_context(current_context());
}
RIG_API CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  RIG_NEEDS_CONTEXT();
  *least = 0;
  *greatest = -5;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuCtxSetFlags(unsigned) {
  RIG_NEEDS_CONTEXT();
  return CUDA_SUCCESS;
}
RIG_API CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned) {
  RIG_NEEDS_CONTEXT();
  return peer && peer != current_context() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
