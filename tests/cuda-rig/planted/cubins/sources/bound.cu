// fill_with from when it ran with 128 threads.
#include "device.cuh"
KERNEL(128, fill_with, (float* out, long long n, float value)) {
  if (threadIdx.x < n) out[threadIdx.x] = value;
}
