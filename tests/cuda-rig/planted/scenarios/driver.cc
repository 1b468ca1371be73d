// Streams, modules, launches, captures and memory.
#include "scenarios.h"

// A second stream reads what a first one writes: rounds that read the old values.
static void two_streams(bool with_event) {
  open_device(0);
  CUfunction fill = function_of("fill_with");
  CUstream first = new_stream(), second = new_stream();
  CUevent event;
  MUST(cuEventCreate(&event, 2));
  void* pinned;
  MUST(cuMemHostAlloc(&pinned, 64 * sizeof(float), 0));
  int wrong = 0;
  for (int round = 0; round < 20; round++) {
    CUdeviceptr values = device_floats(64, 0);
    long long n = 64;
    float seven = 7;
    MUST(launch(fill, 1, 64, 0, first, {&values, &n, &seven}));
    if (with_event) {
      MUST(cuEventRecord(event, first));
      MUST(cuStreamWaitEvent(second, event, 0));
    }
    MUST(cuMemcpyDtoHAsync_v2(pinned, values, 64 * sizeof(float), second));
    MUST(cuStreamSynchronize(second));
    wrong += static_cast<float*>(pinned)[0] != 7;
    MUST(cuStreamSynchronize(first));
  }
  say("wrong", wrong);
}
SCENARIO(missing_event) { two_streams(false); }
SCENARIO(event_between_streams) { two_streams(true); }

// One pinned buffer for many copies.
static void pinned_buffer(bool waits) {
  open_device(0);
  CUstream stream = new_stream();
  void* pinned;
  MUST(cuMemHostAlloc(&pinned, sizeof(float), 0));
  int wrong = 0;
  for (int round = 0; round < 20; round++) {
    CUdeviceptr value = device_memory(sizeof(float));
    *static_cast<float*>(pinned) = float(round);
    MUST(cuMemcpyHtoDAsync_v2(value, pinned, sizeof(float), stream));
    if (waits) MUST(cuStreamSynchronize(stream));
    *static_cast<float*>(pinned) = -1;
    MUST(cuStreamSynchronize(stream));
    wrong += host_floats(value, 1)[0] != float(round);
  }
  say("wrong", wrong);
}
SCENARIO(pinned_reused_early) { pinned_buffer(false); }
SCENARIO(pinned_reused_after_waiting) { pinned_buffer(true); }

SCENARIO(polling_an_event_makes_progress) {
  open_device(0);
  CUfunction fill = function_of("fill_with");
  CUstream stream = new_stream();
  CUevent event;
  MUST(cuEventCreate(&event, 2));
  CUdeviceptr values = device_floats(8, 0);
  long long n = 8;
  float three = 3;
  MUST(launch(fill, 1, 32, 0, stream, {&values, &n, &three}));
  MUST(cuEventRecord(event, stream));
  CUresult result;
  while ((result = cuEventQuery(event)) == CUDA_ERROR_NOT_READY) {
  }
  say("result", result);
  say("value", long(host_floats(values, 8)[7]));
}

SCENARIO(module_checks) {
  open_device(0);
  CUmodule module;
  CUfunction function;
  for (const char* name :
       {"signature.cubin", "stale.cubin", "bound.cubin", "scenario_90.cubin", "scenario_80.cubin"})
    say(name, cuModuleLoadData(&module, cubin(name).data()));
  say("not_a_cubin", cuModuleLoadData(&module, "no cubin at all, but long enough to look at it for a while"));
  MUST(cuModuleLoadData(&module, cubin("scenario_80.cubin").data()));
  say("unknown_function", cuModuleGetFunction(&function, module, "no_such_kernel"));
  MUST(cuModuleGetFunction(&function, module, "fill_with"));
  for (size_t i = 0; i < 4; i++) {
    size_t offset = 0, bytes = 0;
    say("parameter", cuFuncGetParamInfo(function, i, &offset, &bytes));
    say("offset", long(offset));
    say("bytes", long(bytes));
  }
}

SCENARIO(architectures) {
  open_device(0);
  CUmodule module;
  for (const char* name : {"scenario_90.cubin", "scenario_80.cubin"})
    say(name, cuModuleLoadData(&module, cubin(name).data()));
}

SCENARIO(launch_checks) {
  open_device(0);
  CUstream stream = new_stream();
  CUfunction fill = function_of("fill_with"), shared = function_of("through_shared");
  CUdeviceptr out = device_floats(64, 0), in = device_floats(64, 1);
  long long n = 64;
  float one = 1;
  int count = 64;
  say("threads_over_bound", launch(fill, 1, 512, 0, stream, {&out, &n, &one}));
  say("threads_over_1024", launch(fill, 1, 2048, 0, stream, {&out, &n, &one}));
  say("no_block", launch(fill, 0, 32, 0, stream, {&out, &n, &one}));
  say("shared_48k", launch(shared, 1, 32, 48 << 10, stream, {&out, &in, &count}));
  say("shared_unasked", launch(shared, 1, 32, 49 << 10, stream, {&out, &in, &count}));
  say("ask_163k", cuFuncSetAttribute(shared, FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES, 163 << 10));
  say("shared_asked", launch(shared, 1, 32, 163 << 10, stream, {&out, &in, &count}));
  say("ask_164k", cuFuncSetAttribute(shared, FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES, 164 << 10));
  say("at_the_end", cuCtxSynchronize());
}

// A fault's result, and that it stays.
static void fault(CUresult (*cause)(CUstream)) {
  open_device(0);
  CUstream stream = new_stream();
  say("launch", cause(stream));
  say("synchronize", cuStreamSynchronize(stream));
  CUdeviceptr memory;
  say("allocate", cuMemAlloc_v2(&memory, 16));
  CUstream other;
  say("new_stream", cuStreamCreate(&other, CU_STREAM_NON_BLOCKING));
}
SCENARIO(illegal_address) {
  fault([](CUstream stream) {
    CUdeviceptr out = device_floats(64, 0);
    long long at = 64;
    return launch(function_of("write_far"), 1, 32, 0, stream, {&out, &at});
  });
}
SCENARIO(write_into_the_slack) {
  // 60 floats end 16 bytes before the guard page.
  fault([](CUstream stream) {
    CUdeviceptr out = device_floats(60, 0);
    long long at = 29;
    return launch(function_of("write_far"), 1, 32, 0, stream, {&out, &at});
  });
}
SCENARIO(use_after_free) {
  fault([](CUstream stream) {
    CUdeviceptr out = device_floats(64, 0);
    long long at = 0;
    MUST(cuMemFree_v2(out));
    return launch(function_of("write_far"), 1, 32, 0, stream, {&out, &at});
  });
}
SCENARIO(arguments_in_wrong_order) {
  fault([](CUstream stream) {
    CUdeviceptr out = device_floats(64, 0);
    long long n = 64;
    float one = 1;
    return launch(function_of("fill_with"), 1, 32, 0, stream, {&n, &out, &one});
  });
}
SCENARIO(misaligned_vector) {
  fault([](CUstream stream) {
    CUdeviceptr out = device_floats(32, 0), in = device_floats(32, 1);
    int offset = 1;
    return launch(function_of("read_four"), 1, 32, 0, stream, {&out, &in, &offset});
  });
}

SCENARIO(memory_limit) {
  open_device(0);
  size_t free_bytes, total;
  CUdeviceptr first, second;
  MUST(cuMemGetInfo_v2(&free_bytes, &total));
  say("total", long(total));
  say("first", cuMemAlloc_v2(&first, total / 2 + 256));
  say("second", cuMemAlloc_v2(&second, total / 2));
  say("free", cuMemFree_v2(first));
  say("again", cuMemFree_v2(first));
  say("third", cuMemAlloc_v2(&second, total / 2));
  // Poisoned, also where it was not paid for.
  float value;
  MUST(cuMemcpyDtoH_v2(&value, second + total / 4, sizeof value));
  say("poisoned", value != value);
}

SCENARIO(synchronize_in_a_capture) {
  open_device(0);
  CUfunction fill = function_of("fill_with");
  CUstream stream = new_stream();
  CUdeviceptr out = device_floats(64, 0);
  long long n = 64;
  float one = 1;
  CUgraph graph;
  MUST(cuStreamBeginCapture_v2(stream, CAPTURE_THREAD_LOCAL));
  say("launch", launch(fill, 1, 32, 0, stream, {&out, &n, &one}));
  say("synchronize", cuStreamSynchronize(stream));
  say("next_launch", launch(fill, 1, 32, 0, stream, {&out, &n, &one}));
  say("end", cuStreamEndCapture(stream, &graph));
  say("after", launch(fill, 1, 32, 0, stream, {&out, &n, &one}));
  say("synchronize_after", cuStreamSynchronize(stream));
}

SCENARIO(replay_of_a_graph) {
  open_device(0);
  CUfunction shared = function_of("through_shared");
  CUstream stream = new_stream();
  CUdeviceptr out = device_floats(8, 0), in = device_floats(8, 1);
  int n = 8;
  CUgraph graph;
  CUgraphExec executable;
  MUST(cuStreamBeginCapture_v2(stream, CAPTURE_THREAD_LOCAL));
  MUST(launch(shared, 1, 32, 32, stream, {&out, &in, &n}));
  MUST(cuStreamEndCapture(stream, &graph));
  n = 0;  // parameters were copied
  MUST(cuGraphInstantiateWithFlags(&executable, graph, 0));
  MUST(cuGraphDestroy(graph));
  say("before", long(host_floats(out, 8)[0]));
  MUST(cuGraphLaunch(executable, stream));
  MUST(cuStreamSynchronize(stream));
  say("first", long(host_floats(out, 8)[0]));
  std::vector<float> five(8, 5);
  MUST(cuMemcpyHtoD_v2(in, five.data(), 32));
  MUST(cuGraphLaunch(executable, stream));
  MUST(cuStreamSynchronize(stream));
  say("second", long(host_floats(out, 8)[0]));
  MUST(cuGraphExecDestroy(executable));
}

static Status product(emu::Blas* blas, CUdeviceptr a, CUdeviceptr b, CUdeviceptr c) {
  // c[2][3] = a[3][4]^T-style: rows of 4 values on both sides.
  float one = 1, zero = 0;
  return cublasGemmEx(blas, OP_T, OP_N, 3, 2, 4, &one, reinterpret_cast<void*>(a), TYPE_F32, 4,
                      reinterpret_cast<void*>(b), TYPE_F32, 4, &zero, reinterpret_cast<void*>(c), TYPE_F32, 3,
                      COMPUTE_32F, -1);
}

SCENARIO(captured_product) {
  open_device(0);
  CUstream stream = new_stream();
  CUdeviceptr a = device_floats(12, 2), b = device_floats(8, 3), c = device_memory(24),
              workspace = device_memory(1 << 20);
  emu::Blas* blas;
  CUgraph graph;
  CUgraphExec executable;
  MUST(cublasCreate_v2(&blas));
  MUST(cublasSetWorkspace_v2(blas, reinterpret_cast<void*>(workspace), 1 << 20));
  MUST(cublasSetStream_v2(blas, stream));
  say("eager", product(blas, a, b, c));
  MUST(cuStreamSynchronize(stream));
  say("value", long(host_floats(c, 6)[5]));
  MUST(cuStreamBeginCapture_v2(stream, CAPTURE_THREAD_LOCAL));
  say("without_workspace", product(blas, a, b, c));
  MUST(cublasSetWorkspace_v2(blas, reinterpret_cast<void*>(workspace), 1 << 20));
  say("with_workspace", product(blas, a, b, c));
  MUST(cuStreamEndCapture(stream, &graph));
  MUST(cuGraphInstantiateWithFlags(&executable, graph, 0));
  MUST(cuGraphLaunch(executable, stream));
  say("replay", cuStreamSynchronize(stream));
  // What a program keeps in the workspace is lost.
  float kept = host_floats(workspace, 1)[0];
  say("workspace_used", kept != kept);
}
