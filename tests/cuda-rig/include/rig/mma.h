// Tensor-core and asynchronous-copy instructions, with the fragment layouts that the PTX ISA documents.
//
// The device side of the same five functions is the product's mma.cuh. Here a copy's destination is poisoned
// when it is issued and filled when the thread waits for its group, and not before: a missing wait is seen as
// NaN.
#pragma once

#include "block.h"

namespace rig {

typedef uint64_t __attribute__((may_alias)) AliasWord;
typedef uint32_t __attribute__((may_alias)) AliasHalf;

inline void check_row(const char* what, const void* address) {
  if (uintptr_t(address) % 16) fail("%s: address %p is not aligned to 16 bytes", what, address);
}

inline void load_matrix(uint32_t* to, const void* row, bool transposed, const char* what) {
  check_row(what, row);
  if (!is_shared(row, 16)) fail("%s: row %p is not wholly in shared memory", what, row);
  if (load_matrix_begin(row)) {
    uint32_t rows[WARP][4];
    for (unsigned i = 0; i < WARP; i++) {
      const AliasHalf* from = static_cast<const AliasHalf*>(load_matrix_row(i));
      for (unsigned word = 0; word < 4; word++) rows[i][word] = from[word];
    }
    load_matrix_finish(rows, transposed);
  }
  for (unsigned i = 0; i < 4; i++) to[i] = current->words[i];
}

}  // namespace rig

// Four 8x8 matrices of 16-bit values from shared memory. Lane i points at row i % 8 of matrix i / 8. Word m
// of lane t holds row t / 4, columns 2 (t % 4) and the next, of matrix m.
inline void ldmatrix_x4(unsigned* to, const void* row) { rig::load_matrix(to, row, false, "ldmatrix_x4"); }
// The same with every matrix transposed: word m of lane t holds column t / 4, rows 2 (t % 4) and the next.
inline void ldmatrix_x4_trans(unsigned* to, const void* row) {
  rig::load_matrix(to, row, true, "ldmatrix_x4_trans");
}

// c[16][8] += a[16][16] b[16][8]: bf16 in, f32 sums. With g = lane / 4 and t = lane % 4, pairs are along the
// row of a and the column of b: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8); b0 (2t, g),
// b1 (2t + 8, g); c0, c1 (g, 2t and 2t + 1), c2, c3 (g + 8, the same).
inline void mma_bf16_16816(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  rig::Fiber& self = *rig::current;
  for (int i = 0; i < 4; i++) self.words[i] = a[i];
  self.words[4] = b0;
  self.words[5] = b1;
  __builtin_memcpy(&self.words[6], c, 16);
  rig::multiply_16816();
  __builtin_memcpy(c, &self.words[6], 16);
}

// Starts copying 16 bytes from global to shared memory: `bytes` (0..16) are read, the rest is zero.
inline void cp_async_16(void* to_shared, const void* from_global, int bytes) {
  rig::check_row("cp_async_16 to shared", to_shared);
  rig::check_row("cp_async_16 from global", from_global);
  if (bytes < 0 || bytes > 16) rig::fail("cp_async_16 of %d bytes", bytes);
  if (!rig::is_shared(to_shared, 16))
    rig::fail("cp_async_16: destination %p is not wholly in shared memory", to_shared);
  if (bytes && rig::is_shared(from_global, 1))
    rig::fail("cp_async_16: source %p is in shared memory", from_global);
  rig::AsyncCopy* copy = rig::async_copy_new();
  copy->to = to_shared;
  copy->from = from_global;
  copy->bytes = unsigned(bytes);
  // The device may read at any time between here and the wait; half the copies read first, half last.
  copy->read_late = rig::coin();
  copy->early[0] = copy->early[1] = 0;
  if (!copy->read_late)
    for (int i = 0; i < bytes; i++)
      reinterpret_cast<unsigned char*>(copy->early)[i] = static_cast<const unsigned char*>(from_global)[i];
  rig::AliasWord* destination = static_cast<rig::AliasWord*>(to_shared);
  destination[0] = destination[1] = ~uint64_t(0);
}
inline void cp_async_16(void* to_shared, const void* from_global) { cp_async_16(to_shared, from_global, 16); }

// Closes the group of the copies issued since the last one.
inline void cp_async_commit() { rig::async_copy_commit(); }

// Waits until at most the N newest groups of this thread are unfinished.
template <int N>
inline void cp_async_wait() {
  while (rig::AsyncCopy* copy = rig::async_copy_landing(N)) {
    if (copy->read_late)
      for (unsigned i = 0; i < copy->bytes; i++)
        reinterpret_cast<unsigned char*>(copy->early)[i] = static_cast<const unsigned char*>(copy->from)[i];
    rig::AliasWord* destination = static_cast<rig::AliasWord*>(copy->to);
    destination[0] = copy->early[0];
    destination[1] = copy->early[1];
  }
}
