// The scheduler of one thread block.
//
// Owns fibers, barriers, warp meetings, and the order in which they run: probabilistic concurrency testing
// (PCT), where warps have random priorities and the leading one runs as far as barriers let it. A missing
// barrier shows itself at once in such an order, and hardly ever in a uniformly random one. This file is
// never compiled with a sanitizer: to a race detector, CUDA threads are its fibers and the barriers below
// their only synchronisation.
#include "block.h"

#include <sys/mman.h>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include <utility>

#include "stack_switch.h"

#if defined(RIG_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#define RIG_RACE(CALL) CALL
#else
#define RIG_RACE(CALL) \
  do {                 \
  } while (0)
#endif

#if defined(__x86_64__)
asm(R"(
.text
.globl rig_switch_stack
.hidden rig_switch_stack
.type rig_switch_stack,@function
rig_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size rig_switch_stack,.-rig_switch_stack
)");
#endif

namespace rig {

Fiber* current = nullptr;
Shape shape;
unsigned char* dynamic_shared = nullptr;

namespace {

constexpr unsigned WARPS_MAX = THREADS_MAX / WARP;
constexpr unsigned COPIES_MAX = 512;  // unfinished asynchronous copies of one thread

// Sanitizers' frames are large.
#if defined(RIG_TSAN) || defined(RIG_ASAN)
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif

// What the lanes of a warp are doing: each live lane is in exactly one of ready, at_block, at_warp, or runs.
struct Warp {
  unsigned ready, at_block, at_warp, alive;
  unsigned barriers[2];  // addresses that stand for its __syncwarp in turn
  unsigned meetings;
};

struct Copies {
  AsyncCopy* ring;  // COPIES_MAX of them
  unsigned first, count, group;
};

struct Scheduler {
  Fiber fibers[THREADS_MAX];
  Warp warps[WARPS_MAX];
  Copies copies[THREADS_MAX];
  unsigned threads, warp_count, alive;
  unsigned at_block, votes, last_votes, barriers;
  char begins, ends;  // what stands for a block's begin and end: two, or a thread that begins late would seem
                      // to follow one that has ended
  char barrier_address[2];      // what stands for two consecutive __syncthreads in turn
  unsigned rank_of[WARPS_MAX];  // warp -> priority, 0 leads
  unsigned warp_at[WARPS_MAX];  // priority -> warp
  unsigned ready_ranks;         // priorities of warps that have a ready lane
  bool uniform;                 // one block in eight: no leading warp
  uint64_t random;
  char* stacks;
  AsyncCopy* rings;
  unsigned prepared;  // threads that have a stack
  void* home;         // the stack of run_block
  void* home_tsan;
  void (*call)(void**);
  void** arguments;
};

Scheduler scheduler;
char failure[1024];

uint64_t draw() {
  uint64_t x = scheduler.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return scheduler.random = x;
}

void shuffle_priorities() {
  Scheduler& s = scheduler;
  for (unsigned i = s.warp_count; i > 1; i--) {
    unsigned j = unsigned(draw() >> 20) % i;
    std::swap(s.warp_at[i - 1], s.warp_at[j]);
  }
  s.ready_ranks = 0;
  for (unsigned rank = 0; rank < s.warp_count; rank++) {
    s.rank_of[s.warp_at[rank]] = rank;
    if (s.warps[s.warp_at[rank]].ready) s.ready_ranks |= 1u << rank;
  }
}

void make_ready(unsigned warp, unsigned lanes) {
  scheduler.warps[warp].ready |= lanes;
  scheduler.ready_ranks |= 1u << scheduler.rank_of[warp];
}

// The thread to run next, taken from the ready ones; null if there is none.
Fiber* take_next() {
  Scheduler& s = scheduler;
  if (!s.ready_ranks) return nullptr;
  uint64_t random = draw();
  if (s.uniform || !(random >> 32 & 1023)) shuffle_priorities();
  unsigned rank = unsigned(__builtin_ctz(s.ready_ranks)), index = s.warp_at[rank];
  Warp& warp = s.warps[index];
  // A random ready lane: the first one at or after a random position.
  unsigned start = unsigned(random >> 10) & 31;
  unsigned rotated = warp.ready >> start | (start ? warp.ready << (32 - start) : 0);
  unsigned lane = (unsigned(__builtin_ctz(rotated)) + start) & 31;
  warp.ready &= ~(1u << lane);
  if (!warp.ready) s.ready_ranks &= ~(1u << rank);
  return &s.fibers[index * WARP + lane];
}

// Leaves the running thread, which waits or has ended, for the next one, or for run_block when no one can
// run.
void leave() {
  Fiber* self = current;
  Fiber* next = take_next();
  if (next == self) return;
  current = next;
  RIG_RACE(__tsan_switch_to_fiber(next ? next->tsan : scheduler.home_tsan, 1));
  switch_stack(&self->stack_pointer, next ? next->stack_pointer : scheduler.home);
}

void open_barrier_if_all_here() {
  Scheduler& s = scheduler;
  if (!s.at_block || s.at_block != s.alive) return;
  s.at_block = 0;
  s.last_votes = s.votes;
  s.votes = 0;
  s.barriers++;
  for (unsigned i = 0; i < s.warp_count; i++) {
    unsigned lanes = s.warps[i].at_block;
    s.warps[i].at_block = 0;
    if (lanes) make_ready(i, lanes);
  }
}

// A transpose of register fragments: every lane gets the two values of each matrix that belong to it.
void deal_matrices(Fiber* lanes, const uint32_t (*rows)[4], bool transposed) {
  for (unsigned t = 0; t < WARP; t++) {
    for (unsigned matrix = 0; matrix < 4; matrix++) {
      if (!transposed) {
        lanes[t].words[matrix] = rows[matrix * 8 + t / 4][t % 4];
        continue;
      }
      auto element = [&](unsigned row, unsigned column) {
        return rows[matrix * 8 + row][column / 2] >> (column % 2 * 16) & 0xffffu;
      };
      lanes[t].words[matrix] = element(2 * (t % 4), t / 4) | element(2 * (t % 4) + 1, t / 4) << 16;
    }
  }
}

float from_bf16(uint32_t half) {
  uint32_t word = half << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

void multiply(Fiber* lanes) {
  // b is kept with its 8 columns innermost: the loop below is then one vector operation per k.
  float a[16][16], b[16][8], c[16][8];
  for (unsigned t = 0; t < WARP; t++) {
    const uint32_t* words = lanes[t].words;
    unsigned g = t / 4, k = t % 4 * 2;
    for (unsigned half = 0; half < 2; half++) {
      a[g][k + half] = from_bf16(words[0] >> (16 * half) & 0xffff);
      a[g + 8][k + half] = from_bf16(words[1] >> (16 * half) & 0xffff);
      a[g][k + 8 + half] = from_bf16(words[2] >> (16 * half) & 0xffff);
      a[g + 8][k + 8 + half] = from_bf16(words[3] >> (16 * half) & 0xffff);
      b[k + half][g] = from_bf16(words[4] >> (16 * half) & 0xffff);
      b[k + 8 + half][g] = from_bf16(words[5] >> (16 * half) & 0xffff);
    }
    __builtin_memcpy(&c[g][k], &words[6], 8);
    __builtin_memcpy(&c[g + 8][k], &words[8], 8);
  }
  for (unsigned row = 0; row < 16; row++)
    for (unsigned k = 0; k < 16; k++)
      for (unsigned column = 0; column < 8; column++) c[row][column] += a[row][k] * b[k][column];
  for (unsigned t = 0; t < WARP; t++) {
    unsigned g = t / 4, k = t % 4 * 2;
    __builtin_memcpy(&lanes[t].words[6], &c[g][k], 8);
    __builtin_memcpy(&lanes[t].words[8], &c[g + 8][k], 8);
  }
}

// The lanes of `mask` that this meeting waits for are all there, for the same thing.
bool complete(const Warp& warp, const Fiber* lanes, unsigned mask, Meeting meeting) {
  unsigned wanted = mask & warp.alive;
  if ((warp.at_warp & wanted) != wanted) return false;
  for (unsigned rest = wanted; rest; rest &= rest - 1) {
    const Fiber& other = lanes[__builtin_ctz(rest)];
    if (other.mask != mask || other.meeting != meeting) return false;
  }
  return true;
}

void hand_out(Warp& warp, Fiber* lanes, unsigned wanted, Meeting meeting) {
  unsigned votes = 0;
  switch (meeting) {
    case Meeting::Shuffle:
      for (unsigned rest = wanted; rest; rest &= rest - 1) {
        Fiber& lane = lanes[__builtin_ctz(rest)];
        if (!(wanted >> lane.source & 1))
          fail("shuffle reads lane %u, which has exited or never was", lane.source);
        lane.result = lanes[lane.source].value;
      }
      break;
    case Meeting::Ballot:
      for (unsigned rest = wanted; rest; rest &= rest - 1) {
        unsigned i = unsigned(__builtin_ctz(rest));
        votes |= unsigned(lanes[i].value != 0) << i;
      }
      for (unsigned rest = wanted; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].result = votes;
      break;
    case Meeting::Multiply:
      multiply(lanes);
      break;
    default:
      break;
  }
  warp.at_warp &= ~wanted;
}

// Threads that have exited count as arrived; whoever waited for this one alone goes on.
void release_waiters_of_exited(unsigned warp_index) {
  Warp& warp = scheduler.warps[warp_index];
  Fiber* lanes = &scheduler.fibers[warp_index * WARP];
  for (unsigned rest = warp.at_warp; rest; rest &= rest - 1) {
    unsigned i = unsigned(__builtin_ctz(rest));
    if (!(warp.at_warp >> i & 1) || !complete(warp, lanes, lanes[i].mask, lanes[i].meeting)) continue;
    unsigned wanted = lanes[i].mask & warp.alive;
    if (lanes[i].meeting == Meeting::LoadMatrix || lanes[i].meeting == Meeting::Multiply) continue;
    hand_out(warp, lanes, wanted, lanes[i].meeting);
    make_ready(warp_index, wanted);
  }
  open_barrier_if_all_here();
}

void thread_main() {
  RIG_RACE(__tsan_acquire(&scheduler.begins));
  scheduler.call(scheduler.arguments);
  RIG_RACE(__tsan_release(&scheduler.ends));
  Scheduler& s = scheduler;
  unsigned warp = current->index / WARP;
  s.warps[warp].alive &= ~(1u << lane());
  s.alive--;
  release_waiters_of_exited(warp);
  leave();
  abort();
}

void fail_as_divergent() {
  Scheduler& s = scheduler;
  unsigned at_warp = 0;
  char detail[256] = "";
  for (unsigned i = 0; i < s.warp_count; i++) {
    at_warp += unsigned(__builtin_popcount(s.warps[i].at_warp));
    if (detail[0] || !s.warps[i].at_warp) continue;
    const Fiber& waits = s.fibers[i * WARP + unsigned(__builtin_ctz(s.warps[i].at_warp))];
    static const char* const NAMES[] = {"nothing", "a shuffle", "a vote", "__syncwarp", "ldmatrix", "mma"};
    snprintf(detail, sizeof detail, "; thread %u waits for %s with mask 0x%08x", waits.index,
             NAMES[unsigned(waits.meeting)], waits.mask);
  }
  snprintf(failure, sizeof failure,
           "divergent barrier in block (%u,%u,%u): %u threads at __syncthreads, %u at a warp "
           "operation, %u exited%s",
           shape.block_index.x, shape.block_index.y, shape.block_index.z, s.at_block, at_warp,
           s.threads - s.alive, detail);
}

void reset(unsigned threads) {
  Scheduler& s = scheduler;
  s.threads = s.alive = threads;
  s.warp_count = (threads + WARP - 1) / WARP;
  s.at_block = s.votes = s.last_votes = s.barriers = 0;
  for (unsigned i = 0; i < s.warp_count; i++) {
    unsigned lanes = threads - i * WARP < WARP ? threads - i * WARP : WARP;
    unsigned all = lanes == WARP ? FULL_MASK : (1u << lanes) - 1;
    s.warps[i] = {all, 0, 0, all, {0, 0}, 0};
    s.warp_at[i] = i;
  }
  s.uniform = !(draw() >> 40 & 7);
  shuffle_priorities();
}

}  // namespace

void prepare_block_runtime(unsigned threads) {
  Scheduler& s = scheduler;
  if (!s.stacks) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    size_t copies = sizeof(AsyncCopy) * COPIES_MAX * THREADS_MAX;
    s.stacks = static_cast<char*>(mmap(nullptr, STACK * THREADS_MAX, PROT_READ | PROT_WRITE, flags, -1, 0));
    s.rings = static_cast<AsyncCopy*>(mmap(nullptr, copies, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (s.stacks == MAP_FAILED || s.rings == MAP_FAILED) {
      perror("cuda-rig: no memory for the stacks of CUDA threads");
      abort();
    }
  }
  for (; s.prepared < threads; s.prepared++) {
    unsigned i = s.prepared;
    s.copies[i].ring = s.rings + size_t(i) * COPIES_MAX;
    // The lowest page of a stack is a guard against running over it into the neighbour's.
    mprotect(s.stacks + STACK * i, 4096, PROT_NONE);
    RIG_RACE(s.fibers[i].tsan = __tsan_create_fiber(0));
  }
}

void seed_schedule(uint64_t seed) {
  scheduler.random = (seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  for (int i = 0; i < 4; i++) draw();
}

bool run_block(void (*call)(void**), void** arguments) {
  Scheduler& s = scheduler;
  reset(unsigned(shape.block_dim.volume()));
  s.call = call;
  s.arguments = arguments;
  Dim3 dim = shape.block_dim;
  for (unsigned i = 0; i < s.threads; i++) {
    Fiber& fiber = s.fibers[i];
    fiber.thread = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
    fiber.index = i;
    fiber.meeting = Meeting::None;
    // Stacks that all began at one offset within a page would fight for the same cache lines.
    fiber.stack_pointer = prepare_stack(s.stacks + STACK * (i + 1) - (i % 31) * 128, thread_main);
    s.copies[i].first = s.copies[i].count = s.copies[i].group = 0;
  }
  RIG_RACE(s.home_tsan = __tsan_get_current_fiber());
  RIG_RACE(__tsan_release(&s.begins));
  failure[0] = 0;
  current = take_next();
  RIG_RACE(__tsan_switch_to_fiber(current->tsan, 1));
  switch_stack(&s.home, current->stack_pointer);
  RIG_RACE(__tsan_acquire(&s.ends));
  if (!failure[0] && s.alive) fail_as_divergent();
  current = nullptr;
  return !failure[0];
}

const char* failure_text() { return failure; }

void fail(const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  Dim3 b = shape.block_index, t = current ? current->thread : Dim3{0, 0, 0};
  snprintf(failure, sizeof failure, "%s (block (%u,%u,%u), thread (%u,%u,%u))", text, b.x, b.y, b.z, t.x, t.y,
           t.z);
  // The block is given up where it stands: its threads' stacks are simply used anew.
  RIG_RACE(__tsan_switch_to_fiber(scheduler.home_tsan, 1));
  void* unused;
  switch_stack(&unused, scheduler.home);
  abort();
}

unsigned block_barrier_count(bool value) {
  Scheduler& s = scheduler;
  // A thread can be one barrier ahead of another, never two: two addresses in turn keep their orders apart.
  [[maybe_unused]] char* address = &s.barrier_address[s.barriers & 1];
  RIG_RACE(__tsan_release(address));
  s.warps[current->index / WARP].at_block |= 1u << lane();
  s.votes += value;
  s.at_block++;
  open_barrier_if_all_here();
  leave();
  RIG_RACE(__tsan_acquire(address));
  return s.last_votes;
}
void block_barrier() { block_barrier_count(false); }

namespace {

// Arrives; true if this lane completes the meeting.
bool arrive(Meeting meeting, unsigned mask) {
  Warp& warp = scheduler.warps[current->index / WARP];
  if (!(mask >> lane() & 1)) fail("lane %u is not in its own warp mask 0x%08x", lane(), mask);
  if (meeting == Meeting::Shuffle && !(mask >> current->source & 1))
    fail("shuffle from lane %u, which is outside the mask 0x%08x", current->source, mask);
  current->meeting = meeting;
  current->mask = mask;
  warp.at_warp |= 1u << lane();
  return complete(warp, &scheduler.fibers[current->index & ~(WARP - 1)], mask, meeting);
}

}  // namespace

void meet(Meeting meeting, unsigned mask) {
  unsigned index = current->index / WARP;
  Warp& warp = scheduler.warps[index];
  [[maybe_unused]] unsigned* address = &warp.barriers[warp.meetings & 1];
  if (meeting == Meeting::Sync) RIG_RACE(__tsan_release(address));
  if (arrive(meeting, mask)) {
    unsigned wanted = mask & warp.alive;
    if (meeting == Meeting::Sync) warp.meetings++;
    hand_out(warp, &scheduler.fibers[index * WARP], wanted, meeting);
    make_ready(index, wanted);
  }
  leave();
  if (meeting == Meeting::Sync) RIG_RACE(__tsan_acquire(address));
}

bool load_matrix_begin(const void* row) {
  current->row = row;
  if (arrive(Meeting::LoadMatrix, FULL_MASK)) {
    if (scheduler.warps[current->index / WARP].alive != FULL_MASK)
      fail("ldmatrix in a warp that is not whole");
    return true;
  }
  leave();
  return false;
}
const void* load_matrix_row(unsigned of_lane) {
  return scheduler.fibers[(current->index & ~(WARP - 1)) + of_lane].row;
}
void load_matrix_finish(const uint32_t (*rows)[4], bool transposed) {
  unsigned index = current->index / WARP;
  deal_matrices(&scheduler.fibers[index * WARP], rows, transposed);
  scheduler.warps[index].at_warp = 0;
  make_ready(index, FULL_MASK);
  leave();
}

void multiply_16816() {
  unsigned index = current->index / WARP;
  if (arrive(Meeting::Multiply, FULL_MASK)) {
    Warp& warp = scheduler.warps[index];
    if (warp.alive != FULL_MASK) fail("mma in a warp that is not whole");
    hand_out(warp, &scheduler.fibers[index * WARP], FULL_MASK, Meeting::Multiply);
    make_ready(index, FULL_MASK);
  }
  leave();
}

AsyncCopy* async_copy_new() {
  Copies& copies = scheduler.copies[current->index];
  if (copies.count == COPIES_MAX)
    fail("more than %u asynchronous copies of one thread are unfinished", COPIES_MAX);
  AsyncCopy* copy = &copies.ring[(copies.first + copies.count++) % COPIES_MAX];
  copy->group = copies.group;
  return copy;
}
void async_copy_commit() { scheduler.copies[current->index].group++; }
AsyncCopy* async_copy_landing(unsigned newest) {
  Copies& copies = scheduler.copies[current->index];
  if (!copies.count) return nullptr;
  AsyncCopy* oldest = &copies.ring[copies.first];
  // Groups 0..group-1 are committed; a copy of group `group` is in none yet, and no wait reaches it.
  if (oldest->group + newest >= copies.group) return nullptr;
  copies.first = (copies.first + 1) % COPIES_MAX;
  copies.count--;
  return oldest;
}

bool coin() { return draw() >> 33 & 1; }

}  // namespace rig
