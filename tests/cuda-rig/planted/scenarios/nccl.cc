// Communicators between threads and between processes.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "scenarios.h"

using Clock = std::chrono::steady_clock;

static long ms_since(Clock::time_point start) {
  return long(std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start).count());
}
static void sleep_ms(long ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

template <class T>
static T* at(CUdeviceptr memory) {
  return reinterpret_cast<T*>(memory);
}

// The state once it is no longer "in progress".
static Result settled(Comm comm) {
  Result state;
  do {
    MUST(ncclCommGetAsyncError(comm, &state));
    if (state == NCCL_IN_PROGRESS) sleep_ms(1);
  } while (state == NCCL_IN_PROGRESS);
  return state;
}

static Comm begin(int ranks, const NcclId& id, int rank) {
  NcclConfig config{sizeof(NcclConfig), NCCL_CONFIG_MAGIC, 22703, 0};
  Comm comm;
  Result result = ncclCommInitRankConfig(&comm, ranks, id, rank, &config);
  if (result != NCCL_IN_PROGRESS) say("init", result);
  return comm;
}

// A rank of two: every collective, with sizes beyond a chunk; wrong values counted.
static long collectives(const NcclId& id, int rank) {
  open_device(rank);
  CUstream stream = new_stream();
  Comm comm = begin(2, id, rank);
  if (settled(comm) != NCCL_SUCCESS) return -1;
  long wrong = 0;
  for (size_t count : {size_t(1), size_t(4097), size_t(200001)}) {
    CUdeviceptr x = device_floats(count, float(rank + 1)), gathered = device_memory(2 * count * 4);
    CUdeviceptr got = device_memory(count * 4), spread = device_floats(count, float(rank * 9));
    Result first = ncclAllReduce(at<void>(x), at<void>(x), count, NCCL_FLOAT32, NCCL_SUM, comm, stream);
    if (first != NCCL_SUCCESS && first != NCCL_IN_PROGRESS) return -2;
    if (settled(comm)) return -3;
    MUST(ncclAllGather(at<void>(spread), at<void>(gathered), count, NCCL_FLOAT32, comm, stream));
    MUST(ncclGroupStart());
    MUST(ncclSend(at<void>(spread), count, NCCL_FLOAT32, 1 - rank, comm, stream));
    MUST(ncclRecv(at<void>(got), count, NCCL_FLOAT32, 1 - rank, comm, stream));
    MUST(ncclGroupEnd());
    MUST(ncclBroadcast(at<void>(spread), at<void>(spread), count, NCCL_FLOAT32, 1, comm, stream));
    MUST(cuStreamSynchronize(stream));
    for (float value : host_floats(x, count)) wrong += value != 3;
    std::vector<float> all = host_floats(gathered, 2 * count);
    for (size_t i = 0; i < 2 * count; i++) wrong += all[i] != (i < count ? 0 : 9);
    for (float value : host_floats(got, count)) wrong += value != float((1 - rank) * 9);
    for (float value : host_floats(spread, count)) wrong += value != 9;
  }
  Result ended = ncclCommFinalize(comm);
  if (ended != NCCL_SUCCESS && ended != NCCL_IN_PROGRESS) return -4;
  if (settled(comm)) return -5;
  MUST(ncclCommDestroy(comm));
  return wrong;
}

SCENARIO(two_ranks_as_threads) {
  NcclId id;
  MUST(ncclGetUniqueId(&id));
  long wrong[2];
  std::thread other([&] { wrong[1] = collectives(id, 1); });
  wrong[0] = collectives(id, 0);
  other.join();
  say("rank_0", wrong[0]);
  say("rank_1", wrong[1]);
}

// Forked before the driver starts.
static pid_t fork_rank(void (*body)(const NcclId&), const NcclId& id) {
  pid_t child = fork();
  if (child) return child;
  body(id);
  _exit(0);
}

SCENARIO(two_ranks_as_processes) {
  NcclId id;
  MUST(ncclGetUniqueId(&id));
  pid_t child = fork_rank([](const NcclId& id) { say("rank_1", collectives(id, 1)); }, id);
  say("rank_0", collectives(id, 0));
  int status;
  waitpid(child, &status, 0);
  say("child", status);
}

// The other rank joins, and dies in the middle: the stream hangs until the abort.
SCENARIO(killed_peer) {
  NcclId id;
  MUST(ncclGetUniqueId(&id));
  pid_t child = fork_rank(
      [](const NcclId& id) {
        open_device(1);
        settled(begin(2, id, 1));
        for (;;) pause();
      },
      id);
  open_device(0);
  CUstream stream = new_stream();
  Comm comm = begin(2, id, 0);
  say("joined", settled(comm));
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  CUdeviceptr x = device_floats(64, 1);
  ncclAllReduce(at<void>(x), at<void>(x), 64, NCCL_FLOAT32, NCCL_SUM, comm, stream);
  settled(comm);
  auto start = Clock::now();
  std::thread watchdog([&] {
    sleep_ms(200);
    say("abort", ncclCommAbort(comm));
  });
  say("synchronize", cuStreamSynchronize(stream));
  long waited = ms_since(start);
  watchdog.join();
  say("hung_until_the_abort", waited >= 200 && waited < 5000);
  // The device goes on.
  say("later_work", cuMemcpyHtoD_v2(x, &waited, 4));
}

// A collective in a graph, replayed; an abort waits for the graph.
SCENARIO(captured_collective) {
  NcclId id;
  MUST(ncclGetUniqueId(&id));
  std::atomic<int> wrong{0};
  auto rank = [&](int rank) {
    open_device(rank);
    CUstream stream = new_stream();
    Comm comm = begin(2, id, rank);
    settled(comm);
    CUdeviceptr x = device_floats(5000, 1);
    ncclAllReduce(at<void>(x), at<void>(x), 5000, NCCL_FLOAT32, NCCL_SUM, comm, stream);
    settled(comm);
    CUgraph graph;
    CUgraphExec executable;
    MUST(cuStreamBeginCapture_v2(stream, CAPTURE_THREAD_LOCAL));
    MUST(ncclAllReduce(at<void>(x), at<void>(x), 5000, NCCL_FLOAT32, NCCL_SUM, comm, stream));
    MUST(cuStreamEndCapture(stream, &graph));
    MUST(cuGraphInstantiateWithFlags(&executable, graph, 0));
    MUST(cuGraphDestroy(graph));
    for (int i = 0; i < 3; i++) MUST(cuGraphLaunch(executable, stream));
    MUST(cuStreamSynchronize(stream));
    for (float value : host_floats(x, 5000)) wrong += value != 16;
    std::atomic<bool> aborted{false};
    std::thread aborter([&] {
      MUST(ncclCommAbort(comm));
      aborted = true;
    });
    sleep_ms(100);
    bool blocked = !aborted;
    MUST(cuGraphExecDestroy(executable));
    aborter.join();
    if (rank == 0) say("abort_waited_for_the_graph", blocked);
  };
  std::thread other(rank, 1);
  rank(0);
  other.join();
  say("wrong", wrong);
}

// The thread that makes the communicator has device 0 current, its stream is on device 1.
SCENARIO(wrong_device) {
  CUcontext second = open_device(1);
  CUstream stream = new_stream();
  CUdeviceptr x = device_floats(16, 1);
  open_device(0);
  NcclId id;
  Comm comm;
  MUST(ncclGetUniqueId(&id));
  MUST(ncclCommInitRank(&comm, 1, id, 0));
  MUST(cuCtxSetCurrent(second));
  say("all_reduce", ncclAllReduce(at<void>(x), at<void>(x), 16, NCCL_FLOAT32, NCCL_SUM, comm, stream));
}

SCENARIO(two_ranks_on_one_device) {
  NcclId id;
  MUST(ncclGetUniqueId(&id));
  Result states[2];
  auto rank = [&](int rank) {
    open_device(0);
    states[rank] = settled(begin(2, id, rank));
  };
  std::thread other(rank, 1);
  rank(0);
  other.join();
  say("rank_0", states[0]);
  say("rank_1", states[1]);
}

// Nobody else comes: the abort ends the wait, and the file is gone.
SCENARIO(absent_peer) {
  open_device(0);
  NcclId id;
  MUST(ncclGetUniqueId(&id));
  Comm comm = begin(2, id, 0);
  sleep_ms(50);
  Result state;
  MUST(ncclCommGetAsyncError(comm, &state));
  say("state", state);
  say("file", access((std::string("/dev/shm") + id.text).c_str(), F_OK));
  say("abort", ncclCommAbort(comm));
  for (int i = 0; i < 1000 && !access((std::string("/dev/shm") + id.text).c_str(), F_OK); i++) sleep_ms(1);
  say("file_after", access((std::string("/dev/shm") + id.text).c_str(), F_OK));
}

// All ranks are killed before they have joined: the next maker of an id removes the file.
SCENARIO(killed_before_joining) {
  NcclId id;
  int pipe_ends[2];
  MUST(pipe(pipe_ends));
  pid_t child = fork();
  if (!child) {
    open_device(0);
    MUST(ncclGetUniqueId(&id));
    begin(2, id, 0);
    if (write(pipe_ends[1], &id, sizeof id) != sizeof id) _exit(1);
    for (;;) pause();
  }
  if (read(pipe_ends[0], &id, sizeof id) != sizeof id) exit(2);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  std::string path = std::string("/dev/shm") + id.text;
  say("left", access(path.c_str(), F_OK));
  NcclId next;
  MUST(ncclGetUniqueId(&next));
  say("swept", access(path.c_str(), F_OK));
}

SCENARIO(abort_of_an_idle_communicator) {
  open_device(0);
  NcclId id;
  Comm comm;
  MUST(ncclGetUniqueId(&id));
  MUST(ncclCommInitRank(&comm, 1, id, 0));
  auto start = Clock::now();
  MUST(ncclCommAbort(comm));
  say("slow", ms_since(start) >= 900);
}

// Two ranks that do not do the same thing hang, and say so.
SCENARIO(different_collectives) {
  NcclId id;
  MUST(ncclGetUniqueId(&id));
  auto rank = [&](int rank) {
    open_device(rank);
    CUstream stream = new_stream();
    Comm comm = begin(2, id, rank);
    settled(comm);
    CUdeviceptr x = device_floats(64, 1);
    ncclAllReduce(at<void>(x), at<void>(x), rank ? 64 : 32, NCCL_FLOAT32, NCCL_SUM, comm, stream);
    settled(comm);
    std::thread watchdog([&] {
      sleep_ms(300);
      ncclCommAbort(comm);
    });
    MUST(cuStreamSynchronize(stream));
    watchdog.join();
  };
  std::thread other(rank, 1);
  rank(0);
  other.join();
}
