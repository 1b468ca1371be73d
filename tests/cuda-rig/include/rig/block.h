// One running thread block: its CUDA threads are fibers of one OS thread.
//
// Owns what a kernel may ask of the block that runs it: indices, barriers, warp meetings, failure. How fibers
// are scheduled is in src/runtime; nothing here switches a stack, so a kernel that never waits pays for no
// switch.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__)
#define RIG_HIDDEN __attribute__((visibility("hidden")))
#endif

namespace rig {

constexpr unsigned WARP = 32;
constexpr unsigned THREADS_MAX = 1024;
constexpr unsigned FULL_MASK = 0xffffffffu;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  size_t volume() const { return size_t(x) * y * z; }
};

// What a warp meets for. Lanes that meet for different things never go on: the launch ends as divergent.
enum class Meeting : unsigned { None, Shuffle, Ballot, Sync, LoadMatrix, Multiply };

// One CUDA thread. Only the runtime (never compiled with a sanitizer) reads another thread's fields, so that
// exchanging registers is no memory access in a race detector's eyes, as on the device.
struct Fiber {
  Dim3 thread;         // threadIdx
  unsigned index;      // position in the block
  Meeting meeting;     // what this thread waits for, if it waits for its warp
  unsigned mask;       // ... with whom
  unsigned source;     // shuffle: the lane it reads
  uint64_t value;      // what this thread brings to a meeting
  uint64_t result;     // what it takes away
  const void* row;     // ldmatrix: the row this lane points at
  uint32_t words[12];  // mma: a[4], b[2], c[4]; ldmatrix: the four words it gets
  void* stack_pointer;
  void* tsan;
};

// The thread that runs, and the block's shape. Hidden: each library has its own runtime, reached without a
// GOT.
struct Shape {
  Dim3 block_index, block_dim, grid_dim;
};
extern RIG_HIDDEN Fiber* current;
extern RIG_HIDDEN Shape shape;

inline unsigned lane() { return current->index % WARP; }

// Ends the launch: prints nothing, never returns to the kernel. The text names what the kernel did wrong.
[[noreturn]] RIG_HIDDEN void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits until every thread of the block that has not exited is here.
RIG_HIDDEN void block_barrier();
// The same, and returns how many of them came with a value that is not zero.
RIG_HIDDEN unsigned block_barrier_count(bool value);

// Waits until every lane of `mask` that has not exited is here for the same meeting with the same mask; the
// results (current->result) are made by the last to arrive.
RIG_HIDDEN void meet(Meeting meeting, unsigned mask);

// True in exactly one lane, the last one to arrive, which must call `load_matrix_finish` once it has read the
// 32 rows; the others return when it has. Two steps, so that the reads are the kernel's own, seen by a race
// detector.
RIG_HIDDEN bool load_matrix_begin(const void* row);
RIG_HIDDEN const void* load_matrix_row(unsigned of_lane);
RIG_HIDDEN void load_matrix_finish(const uint32_t (*rows)[4], bool transposed);

// d = a b + d for the warp, from the words each lane has put into its fiber.
RIG_HIDDEN void multiply_16816();

// Asynchronous copies of the running thread, oldest first.
struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes;     // read from `from`; the rest of the 16 is zero
  bool read_late;     // the source is read when the copy lands, not when it was issued
  uint64_t early[2];  // ... what it held at issue
  unsigned group;
};
RIG_HIDDEN AsyncCopy* async_copy_new();
RIG_HIDDEN void async_copy_commit();
// The next copy that a wait for all but the `newest` newest groups makes visible; null when there is none
// left.
RIG_HIDDEN AsyncCopy* async_copy_landing(unsigned newest);
RIG_HIDDEN bool coin();

// Dynamic shared memory of the block; it ends at a guard page.
extern RIG_HIDDEN unsigned char* dynamic_shared;
RIG_HIDDEN bool is_shared(const void* address, size_t bytes);

}  // namespace rig
