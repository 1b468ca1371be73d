// One tile through asynchronous copies, ldmatrix and mma, and the same with its waits left out. These
// instructions are the rig's own here; the product's kernels use the same names.
#include "device.cuh"

#ifdef TANDEM_RIG

enum Mistake { NONE, NO_WAIT, NO_COMMIT, NO_BARRIER };

// c[16][8] = a[16][16] b[8][16]^T, one warp; with two warps the second one only copies.
template <Mistake M>
__device__ __forceinline__ void tile_product(float* c, const bf16* a, const bf16* b) {
  DYNAMIC_SHARED(bf16, shared);
  bf16* a_tile = shared;            // [16][16]
  bf16* b_tile = shared + 16 * 16;  // [16][16], of which 8 rows are real
  int t = threadIdx.x;
  // 64 threads: 32 pieces of a, 32 of b.
  if (t < 32)
    cp_async_16(a_tile + t * 8, a + t * 8, 16);
  else
    cp_async_16(b_tile + (t - 32) * 8, b + (t - 32 < 16 ? t - 32 : 0) * 8, t - 32 < 16 ? 16 : 0);
  if (M != NO_COMMIT) cp_async_commit();
  if (M != NO_WAIT) cp_async_wait<0>();
  if (M != NO_BARRIER) __syncthreads();
  if (t >= 32) return;
  unsigned fa[4], fb[4];
  // a: matrices (rows 0..8, columns 0..8), (8..16, 0..8), (0..8, 8..16), (8..16, 8..16)
  ldmatrix_x4(fa, a_tile + (t % 8 + t / 8 % 2 * 8) * 16 + t / 16 * 8);
  // b is [n][k]: matrices (n 0..8, k 0..8), (n 0..8, k 8..16), and two of zeros
  ldmatrix_x4(fb, b_tile + (t % 8 + t / 16 * 8) * 16 + t / 8 % 2 * 8);
  float sums[4] = {0, 0, 0, 0};
  mma_bf16_16816(sums, fa, fb[0], fb[1]);
  int g = t / 4, q = t % 4 * 2;
  c[g * 8 + q] = sums[0];
  c[g * 8 + q + 1] = sums[1];
  c[(g + 8) * 8 + q] = sums[2];
  c[(g + 8) * 8 + q + 1] = sums[3];
}
KERNEL(64, tile_by_mma, (float* c, const bf16* a, const bf16* b)) { tile_product<NONE>(c, a, b); }
KERNEL(64, tile_without_wait, (float* c, const bf16* a, const bf16* b)) { tile_product<NO_WAIT>(c, a, b); }
KERNEL(64, tile_without_commit, (float* c, const bf16* a, const bf16* b)) {
  tile_product<NO_COMMIT>(c, a, b);
}
KERNEL(64, tile_without_barrier, (float* c, const bf16* a, const bf16* b)) {
  tile_product<NO_BARRIER>(c, a, b);
}

// b as [k][n], loaded transposed.
KERNEL(32, tile_by_transposed_load, (float* c, const bf16* a, const bf16* b)) {
  __shared__ __align__(16) bf16 a_tile[16 * 16], b_tile[16 * 8];
  int t = threadIdx.x;
  for (int i = t; i < 16 * 16; i += 32) a_tile[i] = a[i];
  for (int i = t; i < 16 * 8; i += 32) b_tile[i] = b[i];
  __syncwarp();
  unsigned fa[4], fb[4];
  ldmatrix_x4(fa, a_tile + (t % 8 + t / 8 % 2 * 8) * 16 + t / 16 * 8);
  ldmatrix_x4_trans(fb, b_tile + t % 16 * 8);
  float sums[4] = {0, 0, 0, 0};
  mma_bf16_16816(sums, fa, fb[0], fb[1]);
  int g = t / 4, q = t % 4 * 2;
  c[g * 8 + q] = sums[0];
  c[g * 8 + q + 1] = sums[1];
  c[(g + 8) * 8 + q] = sums[2];
  c[(g + 8) * 8 + q + 1] = sums[3];
}

#endif
