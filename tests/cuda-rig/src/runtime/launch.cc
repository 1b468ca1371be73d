// A grid's loop over its blocks, its shared memory, and the faults of a running kernel.
//
// Never compiled with a sanitizer, like block.cc.
#include "launch.h"

#include <pthread.h>
#include <sys/mman.h>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "block.h"
#include "rig/mma.h"

extern "C" {
extern char __start_rig_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_rig_shared[] __attribute__((weak, visibility("hidden")));
}

namespace rig {

namespace {

constexpr size_t SHARED_MAX = 256 << 10;  // more than any architecture offers
constexpr size_t PAGE = 4096;

Kernel* kernels = nullptr;
char* shared_end = nullptr;  // a guard page begins here
size_t shared_bytes = 0;

// The launch that runs, for the signal handler.
sigjmp_buf abandon;
volatile bool running = false;
pthread_t runner;
volatile Fault fault = Fault::None;
char fault_text[768];
[[maybe_unused]] struct sigaction before_segv, before_bus;
void (*describe_address)(uintptr_t, char*, size_t) = nullptr;

void locate(char* text, size_t size) {
  Dim3 b = shape.block_index, t = current ? current->thread : Dim3{0, 0, 0};
  snprintf(text, size, "block (%u,%u,%u), thread (%u,%u,%u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

[[maybe_unused]] void on_fault(int number, siginfo_t* info, void* context) {
  if (running && pthread_equal(pthread_self(), runner)) {
    char where[128], what[256] = "";
    locate(where, sizeof where);
    uintptr_t address = uintptr_t(info->si_addr);
    if (address >= uintptr_t(shared_end) && address < uintptr_t(shared_end) + PAGE)
      snprintf(what, sizeof what, ": past the end of %zu bytes of dynamic shared memory", shared_bytes);
    else if (describe_address)
      describe_address(address, what, sizeof what);
    snprintf(fault_text, sizeof fault_text, "illegal address %p (%s)%s", info->si_addr, where, what);
    fault = Fault::IllegalAddress;
    running = false;
    siglongjmp(abandon, 1);
  }
  // Not a kernel's: whoever handled it before does, or the process ends as it would have.
  const struct sigaction& before = number == SIGSEGV ? before_segv : before_bus;
  if (before.sa_flags & SA_SIGINFO && before.sa_sigaction) {
    before.sa_sigaction(number, info, context);
  } else {
    signal(number, SIG_DFL);
    raise(number);
  }
}

void place_shared(size_t bytes) {
#if defined(RIG_ASAN)
  // Exactly as large as asked, between red zones.
  static void* last = nullptr;
  free(last);
  if (posix_memalign(&last, 128, bytes ? bytes : 1)) abort();
  dynamic_shared = static_cast<unsigned char*>(last);
#else
  if (!shared_end) {
    void* map = mmap(nullptr, SHARED_MAX + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) abort();
    shared_end = static_cast<char*>(map) + SHARED_MAX;
    mprotect(shared_end, PAGE, PROT_NONE);
  }
  dynamic_shared = reinterpret_cast<unsigned char*>(shared_end - (bytes + 127) / 128 * 128);
#endif
  shared_bytes = bytes;
}

// Not memset: an address checker watches that, and red zones lie between the variables of the section.
// Addresses are numbers here: to the compiler, the section's two ends are unrelated objects.
__attribute__((optimize("no-tree-loop-distribute-patterns"))) void fill(uintptr_t first, uintptr_t end) {
  for (; first < end && first % 8; first++) *reinterpret_cast<volatile char*>(first) = char(0xff);
  for (; first + 8 <= end; first += 8) *reinterpret_cast<AliasWord*>(first) = ~uint64_t(0);
  for (; first < end; first++) *reinterpret_cast<volatile char*>(first) = char(0xff);
}

// All bits set: NaN as a float and as a bf16, and far out of range as an index.
void poison_shared() {
  fill(uintptr_t(__start_rig_shared), uintptr_t(__stop_rig_shared));
  fill(uintptr_t(dynamic_shared), uintptr_t(dynamic_shared) + shared_bytes);
}

// Blocks in an order of which the kernel may assume nothing: every one once, from a random first by a random
// stride.
struct BlockOrder {
  size_t total, at, stride;
  BlockOrder(size_t blocks, uint64_t seed) : total(blocks) {
    uint64_t mixed = (seed + 7) * 0xd1342543de82ef95ull;
    at = size_t(mixed >> 33) % total;
    stride = size_t(mixed >> 13) % total | 1;
    while (gcd(stride, total) != 1) stride += 2;
  }
  static size_t gcd(size_t a, size_t b) { return b ? gcd(b, a % b) : a; }
  size_t next() { return at = (at + stride) % total; }
};

Outcome run_blocks(const Kernel& kernel, const Launch& launch, void** arguments, uint64_t seed) {
  static size_t done;  // static: not lost when a fault jumps back here
  BlockOrder order(launch.grid.volume(), seed);
  Dim3 grid = launch.grid;
  if (sigsetjmp(abandon, 0)) {
    current = nullptr;
    return {fault, fault_text};
  }
  runner = pthread_self();
  fault = Fault::None;
  for (done = 0; done < order.total; done++) {
    size_t index = order.next();
    shape.block_index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                         unsigned(index / (size_t(grid.x) * grid.y))};
    poison_shared();
    running = true;
    bool ok = run_block(kernel.call, arguments);
    running = false;
    if (!ok) return {fault == Fault::None ? Fault::Kernel : fault, failure_text()};
  }
  return {};
}

}  // namespace

void add_kernel(Kernel* kernel) {
  kernel->next = kernels;
  kernels = kernel;
}
const Kernel* first_kernel() { return kernels; }
const Kernel* find_kernel(const char* name) {
  for (const Kernel* kernel = kernels; kernel; kernel = kernel->next)
    if (!strcmp(kernel->name, name)) return kernel;
  return nullptr;
}

bool is_shared(const void* address, size_t bytes) {
  auto inside = [&](const void* from, size_t size) {
    uintptr_t a = uintptr_t(address), first = uintptr_t(from);
    return a >= first && a + bytes <= first + size;
  };
  if (inside(dynamic_shared, shared_bytes)) return true;
  return __start_rig_shared && inside(__start_rig_shared, size_t(__stop_rig_shared - __start_rig_shared));
}

Outcome run(const Kernel& kernel, const Launch& launch, void** arguments, uint64_t seed) {
  size_t threads = launch.block.volume();
  if (!threads || threads > kernel.threads_max || !launch.grid.volume() || launch.shared > SHARED_MAX) {
    char text[256];
    snprintf(text, sizeof text, "launch of %zu threads (at most %u), %zu blocks, %zu bytes of shared memory",
             threads, kernel.threads_max, launch.grid.volume(), launch.shared);
    return {Fault::Kernel, std::string(kernel.name) + ": " + text};
  }
  prepare_block_runtime(unsigned(threads));
  seed_schedule(seed);
  place_shared(launch.shared);
  shape.block_dim = launch.block;
  shape.grid_dim = launch.grid;
  Outcome outcome = run_blocks(kernel, launch, arguments, seed);
  if (!outcome) outcome.report = std::string(kernel.name) + ": " + outcome.report;
  return outcome;
}

void catch_faults(void (*describe)(uintptr_t, char*, size_t)) {
  static bool installed = false;
  if (installed) return;
  installed = true;
  describe_address = describe;
#if !defined(RIG_TSAN) && !defined(RIG_ASAN)
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  // NODEFER: the handler is left by a jump, which would leave the signal blocked.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
#endif
}

void prepare_thread() {
#if !defined(RIG_TSAN) && !defined(RIG_ASAN)
  constexpr size_t SIZE = 64 << 10;
  stack_t stack = {};
  stack.ss_sp = mmap(nullptr, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  stack.ss_size = SIZE;
  if (stack.ss_sp == MAP_FAILED || sigaltstack(&stack, nullptr)) abort();
#endif
}

}  // namespace rig

#if !defined(RIG_TSAN) && !defined(RIG_ASAN)
// Kernels are compiled with -fsanitize=alignment, whose report this is: the device refuses a misaligned
// access.
struct SourcePlace {
  const char* file;
  uint32_t line, column;
};
struct MismatchData {
  SourcePlace place;
  const void* type;
  unsigned char log_alignment, kind;
};
extern "C" RIG_HIDDEN void __ubsan_handle_type_mismatch_v1(MismatchData* data, uintptr_t address);
extern "C" void __ubsan_handle_type_mismatch_v1(MismatchData* data, uintptr_t address) {
  const char* file = strrchr(data->place.file, '/');
  rig::fault = rig::Fault::Misaligned;
  rig::fail("misaligned address 0x%zx at %s:%u, not a multiple of %u", size_t(address),
            file ? file + 1 : data->place.file, data->place.line, 1u << data->log_alignment);
}
#endif
