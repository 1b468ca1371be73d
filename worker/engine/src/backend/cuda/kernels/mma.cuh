// Tensor cores and asynchronous copies: the five instructions that the tiled kernels are made of.
//
// Owns one inline function an instruction (sm_80 and later). On the device they are inline PTX; on the test
// rig the shim emulates them lane by lane from the fragment layouts of the PTX ISA. mma.sync, not
// nvcuda::wmma: the wmma forerunner of the prefill kernel reached 2 % of an H100's peak, the mma.sync one 205
// TFLOP/s.
//
// Fragments of m16n8k16 (lane = 4 * g + q, g in 0..8, q in 0..4):
//   a[0] = A[g][2q, 2q+1]   a[1] = A[g+8][2q, 2q+1]   a[2] = A[g][2q+8, 2q+9]   a[3] = A[g+8][2q+8, 2q+9]
//   b0   = B[2q, 2q+1][g]   b1   = B[2q+8, 2q+9][g]
//   c[0], c[1] = C[g][2q, 2q+1]   c[2], c[3] = C[g+8][2q, 2q+1]
#pragma once
#include "device.cuh"

#ifndef TANDEM_RIG

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return (unsigned)__cvta_generic_to_shared(pointer);
}

// Loads four 8x8 matrices of 16-bit numbers from shared memory. Lane i gives the address of row i % 8 of
// matrix i / 8, aligned to 16 bytes; r[m] is then numbers 2q and 2q+1 of row g of matrix m.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: r[m] is numbers g of rows 2q and 2q+1 of matrix m.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// C += A B for a warp: A 16x16 and B 16x8 of bf16, C 16x8 of f32.
__device__ __forceinline__ void mma_bf16_16816(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                               unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins to copy the first `bytes` (0..=16) of 16 bytes from global to shared memory and zeros for the rest;
// both addresses are aligned to 16. With `bytes` 0 nothing is read. To be seen only after cp_async_wait by
// the thread that issued it, and by its block after a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// Ends a group of the copies that this thread has issued since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last PENDING groups of this thread are under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif
