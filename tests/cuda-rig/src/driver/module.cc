// Modules and launches. The image is the real cubin: its architecture and its kernels' parameters are
// compared with the host's build of the same sources, which is what runs.
#include <cstdio>
#include <cstring>
#include <string>

#include "../runtime/launch.h"
#include "cubin.h"
#include "memory.h"
#include "world.h"

namespace emu {

struct Function {
  const rig::Kernel* kernel;
  const CubinKernel* cubin;
  Context* context;
  size_t dynamic_max;  // 48 KiB until the program asks for more
};

struct Module {
  Cubin cubin;
  bool from_ptx;
  Context* context;
  std::vector<Function*> functions;
};

namespace {

constexpr size_t SHARED_UNASKED = 48 << 10;

// What differs between the cubin's idea of a kernel and the host build's; empty if nothing does.
std::string difference(const CubinKernel& cubin, const rig::Kernel& kernel) {
  char text[256] = "";
  if (cubin.parameters.size() != kernel.parameter_count) {
    snprintf(text, sizeof text, "the cubin has %zu parameters, the source %u", cubin.parameters.size(),
             kernel.parameter_count);
    return text;
  }
  for (unsigned i = 0; i < kernel.parameter_count; i++) {
    if (cubin.parameters[i].bytes == kernel.parameters[i].bytes) continue;
    snprintf(text, sizeof text, "parameter %u has %zu bytes in the cubin, %u in the source", i,
             cubin.parameters[i].bytes, kernel.parameters[i].bytes);
    return text;
  }
  if (cubin.threads_max != kernel.threads_max)
    snprintf(text, sizeof text, "at most %u threads in the cubin, %u in the source", cubin.threads_max,
             kernel.threads_max);
  return text;
}

bool kernels_match(const Module& module) {
  for (const CubinKernel& cubin : module.cubin.kernels) {
    const rig::Kernel* kernel = rig::find_kernel(cubin.name.c_str());
    if (!kernel) {
      report("kernel %s of the cubin is not in the host's build of the sources: stale cubin?",
             cubin.name.c_str());
      return false;
    }
    if (module.from_ptx) continue;
    std::string differs = difference(cubin, *kernel);
    if (differs.empty()) continue;
    report("kernel %s: %s: stale cubin?", cubin.name.c_str(), differs.c_str());
    return false;
  }
  return true;
}

CUresult load(CUmodule* out, const void* image) {
  RIG_NEEDS_CONTEXT();
  auto* module = new Module{};
  module->context = current_context();
  module->from_ptx = !read_cubin(image, module->cubin);
  if (module->from_ptx && !read_ptx(image, module->cubin)) return CUDA_ERROR_INVALID_IMAGE;
  int arch = module->cubin.arch, device = settings().arch;
  // A cubin runs on its own major architecture from its minor one up; PTX on everything from its own up.
  bool fits = module->from_ptx ? arch <= device : arch / 10 == device / 10 && arch <= device;
  if (!fits) {
    report("the image is for sm_%d, the device is sm_%d", arch, device);
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  if (!kernels_match(*module)) return CUDA_ERROR_INVALID_IMAGE;
  *out = module;
  return CUDA_SUCCESS;
}

CUresult refuse(const Function& f, const char* why, CUresult result) {
  report("launch of %s refused: %s", f.kernel->name, why);
  return result;
}

CUresult check_launch(const Function& f, const rig::Launch& launch, const Stream& stream) {
  size_t threads = launch.block.volume();
  if (!launch.grid.volume() || launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535)
    return refuse(f, "a grid dimension is 0 or too large", CUDA_ERROR_INVALID_VALUE);
  if (!threads || threads > 1024 || launch.block.z > 64)
    return refuse(f, "a block has no thread or too many", CUDA_ERROR_INVALID_VALUE);
  if (threads > f.kernel->threads_max)
    return refuse(f, "more threads than its launch bound", CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
  if (launch.shared + f.cubin->static_shared > SHARED_UNASKED && launch.shared > f.dynamic_max)
    return refuse(f, "more than 48 KiB of shared memory, or more than was asked for by its attribute",
                  CUDA_ERROR_INVALID_VALUE);
  if (f.context != stream.context)
    return refuse(f, "its module is of another device than the stream", CUDA_ERROR_INVALID_HANDLE);
  return CUDA_SUCCESS;
}

// Parameters, copied at the launch as the driver does.
struct Arguments {
  alignas(16) char bytes[4096];
  void* pointers[rig::PARAMETERS_MAX];
  const rig::Kernel* kernel;

  Arguments(const rig::Kernel& kernel, void** given) : kernel(&kernel) {
    size_t at = 0;
    for (unsigned i = 0; i < kernel.parameter_count; i++) {
      const rig::Parameter& parameter = kernel.parameters[i];
      at = (at + parameter.alignment - 1) / parameter.alignment * parameter.alignment;
      pointers[i] = bytes + at;
      memcpy(pointers[i], given[i], parameter.bytes);
      at += parameter.bytes;
    }
  }

  // The host's own memory is readable here, and would not be on a device.
  bool pointers_reachable() const {
    for (unsigned i = 0; i < kernel->parameter_count; i++) {
      if (!kernel->parameters[i].pointer) continue;
      void* pointer;
      memcpy(&pointer, pointers[i], sizeof pointer);
      if (!pointer || is_reachable(pointer)) continue;
      char where[256] = "";
      describe(uintptr_t(pointer), where, sizeof where);
      report("%s: illegal address %p as parameter %u%s", kernel->name, pointer, i, where);
      return false;
    }
    return true;
  }
};

void run_kernel(const Arguments& arguments, const rig::Launch& launch, Context* context, uint64_t seed) {
  if (!arguments.pointers_reachable()) return kill_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
  const rig::Kernel& kernel = *arguments.kernel;
  rig::Outcome outcome = rig::run(kernel, launch, const_cast<void**>(arguments.pointers), seed);
  if (!borders_whole(kernel.name)) return kill_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
  if (outcome) return;
  report("%s", outcome.report.c_str());
  switch (outcome.fault) {
    case rig::Fault::IllegalAddress:
      return kill_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
    case rig::Fault::Misaligned:
      return kill_context(context, CUDA_ERROR_MISALIGNED_ADDRESS);
    default:
      return kill_context(context, CUDA_ERROR_LAUNCH_FAILED);
  }
}

}  // namespace
}  // namespace emu

using namespace emu;

RIG_API CUresult cuModuleLoadData(CUmodule* out, const void* image) { return load(out, image); }
RIG_API CUresult cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned, int*, void**) {
  return load(out, image);
}
// The object stays: launches of it may be in streams and graphs.
RIG_API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

RIG_API CUresult cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
  RIG_NEEDS_CONTEXT();
  const CubinKernel* cubin = module->cubin.find(name);
  if (!cubin) return CUDA_ERROR_NOT_FOUND;
  std::lock_guard<std::mutex> guard(world());
  for (Function* known : module->functions)
    if (known->cubin == cubin) return *out = known, CUDA_SUCCESS;
  module->functions.push_back(new Function{rig::find_kernel(name), cubin, module->context, 0});
  *out = module->functions.back();
  return CUDA_SUCCESS;
}

RIG_API CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t* offset, size_t* bytes) {
  if (index >= f->cubin->parameters.size()) return CUDA_ERROR_INVALID_VALUE;
  *offset = f->cubin->parameters[index].offset;
  if (bytes) *bytes = f->cubin->parameters[index].bytes;
  return CUDA_SUCCESS;
}
RIG_API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  switch (attribute) {
    case FUNC_MAX_THREADS_PER_BLOCK:
      *value = int(f->kernel->threads_max);
      break;
    case FUNC_SHARED_SIZE_BYTES:
      *value = int(f->cubin->static_shared);
      break;
    case FUNC_BINARY_VERSION:
      *value = settings().arch;
      break;
    case FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = int(f->dynamic_max);
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}
RIG_API CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  RIG_NEEDS_CONTEXT();
  if (attribute != FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || size_t(value) + f->cubin->static_shared > settings().shared_optin())
    return refuse(*f, "its attribute asks for more shared memory than the device has",
                  CUDA_ERROR_INVALID_VALUE);
  f->dynamic_max = size_t(value);
  return CUDA_SUCCESS;
}
RIG_API CUresult cuFuncSetCacheConfig(CUfunction, int) { return CUDA_SUCCESS; }

RIG_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction f, int threads,
                                                             size_t dynamic) {
  // Threads and shared memory; registers are not known here.
  size_t shared = dynamic + f->cubin->static_shared + 1024;
  int by_threads = threads > 0 ? 2048 / threads : 0,
      by_shared = int((settings().shared_optin() + 1024) / shared);
  *blocks = std::min(std::min(by_threads, by_shared), 32);
  return CUDA_SUCCESS;
}
RIG_API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction f, int threads,
                                                                      size_t dynamic, unsigned) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, f, threads, dynamic);
}

RIG_API CUresult cuLaunchKernel(CUfunction f, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                CUstream handle, void** parameters, void** extra) {
  RIG_NEEDS_CONTEXT();
  Stream* stream = stream_of(handle);
  if (!f || !stream) return CUDA_ERROR_INVALID_HANDLE;
  if (extra || (f->kernel->parameter_count && !parameters)) return CUDA_ERROR_INVALID_VALUE;
  rig::Launch launch{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared};
  if (CUresult refused = check_launch(*f, launch, *stream)) return refused;
  auto arguments = std::make_shared<Arguments>(*f->kernel, parameters);
  Context* context = f->context;
  return put(stream, {f->kernel->name,
                      [=] {
                        uint64_t seed;
                        {
                          std::lock_guard<std::mutex> guard(world());
                          seed = draw();
                        }
                        run_kernel(*arguments, launch, context, seed);
                        return true;
                      },
                      nullptr});
}
