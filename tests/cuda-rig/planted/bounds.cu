// Addresses that are off: by one element, by one byte row, by four bytes.
#include "device.cuh"

KERNEL(64, copy_one_too_many, (float* out, const float* x, int n)) {
  for (int i = threadIdx.x; i <= n; i += blockDim.x) out[i < n ? i : 0] = x[i];
}

KERNEL(64, shared_one_too_many, (float* out, const float* x, int n)) {
  __shared__ float tile[16];
  int i = threadIdx.x;
  if (i <= 16) tile[i] = x[i % n];
  __syncthreads();
  if (i < 16) out[i] = tile[i];
}

KERNEL(64, dynamic_shared_too_many, (float* out, const float* x, int n)) {
  DYNAMIC_SHARED(float, tile);
  for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = tile[i];
}

// Rows of an odd width, read four at a time.
KERNEL(32, misaligned_load, (float* out, const float* x, int width)) {
  const float* row = x + static_cast<size_t>(threadIdx.x) * width;
  float4 v = *reinterpret_cast<const float4*>(row);
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}
