// Sums of a block, and what becomes of them without their barriers. Each planted mistake stands beside the
// right kernel.
#include "device.cuh"

constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float value, unsigned mask) {
  for (int distance = 16; distance; distance >>= 1) value += __shfl_xor_sync(mask, value, distance);
  return value;
}

template <bool BARRIER>
__device__ __forceinline__ void block_sum_of(float* out, const float* x, int n, float* parts) {
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  sum = warp_sum(sum, ALL);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  if (BARRIER) __syncthreads();
  sum = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f;
  sum = warp_sum(sum, ALL);
  if (threadIdx.x == 0) *out = sum;
}

KERNEL(1024, block_sum, (float* out, const float* x, int n)) {
  __shared__ float parts[32];
  block_sum_of<true>(out, x, n, parts);
}

// No barrier between writing the parts and reading them.
KERNEL(1024, block_sum_without_barrier, (float* out, const float* x, int n)) {
  __shared__ float parts[32];
  block_sum_of<false>(out, x, n, parts);
}

// Lanes of the upper half shuffle with a mask that they are not in.
KERNEL(32, warp_sum_with_wrong_mask, (float* out, const float* x)) {
  float sum = warp_sum(x[threadIdx.x], 0x0000ffffu);
  if (threadIdx.x == 0) *out = sum;
}

// Half of a warp waits for the block, the other half for its warp.
KERNEL(64, barrier_in_a_branch, (float* out, const float* x)) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(ALL, value, 16);
  if (threadIdx.x % 32 >= 16) __syncthreads();
}

KERNEL(32, rotate_in_a_warp, (float* out, const float* x)) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = tile[(threadIdx.x + 1) % 32];
}

// A warp's lanes are not in step: without __syncwarp a neighbour's write may be missing.
KERNEL(32, rotate_without_syncwarp, (float* out, const float* x)) {
  __shared__ float tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = tile[(threadIdx.x + 1) % 32];
}
