// Kernels that the scenarios launch through the driver, from the cubins in cubins/ (build with
// cubins/build.py).
#include "device.cuh"

KERNEL(256, fill_with, (float* out, long long n, float value)) {
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n;
       i += static_cast<long long>(gridDim.x) * blockDim.x)
    out[i] = value;
}

// No bound but the grid's: what lies behind `out` is the caller's care.
KERNEL(256, write_far, (float* out, long long at)) { out[at + threadIdx.x] = 1.0f; }

KERNEL(32, read_four, (float* out, const float* x, int offset)) {
  float4 v = *reinterpret_cast<const float4*>(x + offset);
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

KERNEL(128, through_shared, (float* out, const float* x, int n)) {
  DYNAMIC_SHARED(float, tile);
  for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = tile[n - 1 - i];
}
