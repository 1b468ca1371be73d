// The parameters of an older fill_with: n was an int.
#include "device.cuh"
KERNEL(256, fill_with, (float* out, int n, float value)) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = value;
}
