// A scenario drives the emulated libraries as a program would, right or wrong, and prints what it saw, `key
// value` a line. The Rust tests compare.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "cuda.h"

struct Scenario {
  const char* name;
  void (*body)();
  Scenario* next;
  Scenario(const char* name, void (*body)());
};

#define SCENARIO(NAME)                              \
  static void NAME();                               \
  static Scenario scenario_of_##NAME(#NAME, &NAME); \
  static void NAME()

inline void say(const char* key, long value) { printf("%s %ld\n", key, value); }

// What must go well for the scenario to make sense.
#define MUST(CALL)                                                                      \
  do {                                                                                  \
    if (int result = CALL) {                                                            \
      printf("unexpected %s: %d (line %d of %s)\n", #CALL, result, __LINE__, __FILE__); \
      exit(2);                                                                          \
    }                                                                                   \
  } while (0)

inline CUcontext open_device(int ordinal) {
  CUcontext context;
  MUST(cuInit(0));
  MUST(cuDevicePrimaryCtxRetain(&context, ordinal));
  MUST(cuCtxSetCurrent(context));
  return context;
}

inline CUstream new_stream() {
  CUstream stream;
  MUST(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  return stream;
}

inline CUdeviceptr device_memory(size_t bytes) {
  CUdeviceptr memory;
  MUST(cuMemAlloc_v2(&memory, bytes));
  return memory;
}

inline CUdeviceptr device_floats(size_t count, float value) {
  std::vector<float> host(count, value);
  CUdeviceptr memory = device_memory(count * sizeof(float));
  MUST(cuMemcpyHtoD_v2(memory, host.data(), count * sizeof(float)));
  return memory;
}

inline std::vector<float> host_floats(CUdeviceptr memory, size_t count) {
  std::vector<float> host(count);
  MUST(cuMemcpyDtoH_v2(host.data(), memory, count * sizeof(float)));
  return host;
}

// A file of the folder that CUBINS names.
inline std::string cubin(const char* name) {
  std::ifstream file(std::string(getenv("CUBINS")) + "/" + name, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

inline CUfunction function_of(const char* name) {
  CUmodule module;
  CUfunction function;
  MUST(cuModuleLoadData(&module, cubin("scenario_80.cubin").data()));
  MUST(cuModuleGetFunction(&function, module, name));
  return function;
}

inline CUresult launch(CUfunction f, unsigned blocks, unsigned threads, unsigned shared, CUstream stream,
                       std::vector<void*> parameters) {
  return cuLaunchKernel(f, blocks, 1, 1, threads, 1, 1, shared, stream, parameters.data(), nullptr);
}
