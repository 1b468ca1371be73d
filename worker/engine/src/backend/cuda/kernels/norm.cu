// Norms over rows of the residual stream. The result is bf16: only a product reads it, and that rounds it
// anyway.
//
// A block owns a row: threads = width / 4 rounded up to a warp, 1024 at most, so that a row of up to 4096
// numbers is one 16-byte load a thread. The row is read again for each pass; by then it is in the first-level
// cache. The sums' order depends on the width alone, so a row's result does not depend on the batch.
//
// Forerunner: one pass with the row in registers, 1.7 us for one row of 4096 on an H100 (256 threads with
// 2-byte loads: 7.0 us). These kernels themselves have not run on hardware.
#include "device.cuh"

// Calls `visit(x[i])` for the numbers of a row that belong to this thread.
template <class Visit>
__device__ __forceinline__ void each_of_row(const float* x, int width, Visit visit) {
  if (width % 4 == 0) {
    for (int at = 4 * threadIdx.x; at < width; at += 4 * blockDim.x) {
      float4 v = load4(x + at);
      visit(v.x), visit(v.y), visit(v.z), visit(v.w);
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < width; at += blockDim.x) visit(x[at]);
  }
}

// `out[i] = (x[i] - mean) * factor * weight[i] + bias[i]`; no bias is 0.
__device__ __forceinline__ void write_row(bf16* out, const float* x, const float* weight, const float* bias,
                                          int width, float mean, float factor) {
  if (width % 4 == 0) {
    for (int at = 4 * threadIdx.x; at < width; at += 4 * blockDim.x) {
      float4 v = load4(x + at), w = load4(weight + at);
      float4 b = bias ? load4(bias + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      store4(out + at, make_float4((v.x - mean) * factor * w.x + b.x, (v.y - mean) * factor * w.y + b.y,
                                   (v.z - mean) * factor * w.z + b.z, (v.w - mean) * factor * w.w + b.w));
    }
  } else {
#pragma unroll 1
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
      out[at] = __float2bfloat16((x[at] - mean) * factor * weight[at] + (bias ? bias[at] : 0.0f));
    }
  }
}

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, of [rows, width]; weight [width]. Grid: rows.
// lint: wide >= 3, narrow <= 0
KERNEL(1024, rms_norm, (bf16* out, const float* x, const float* weight, int width, float eps)) {
  __shared__ float parts[32];
  const size_t row = static_cast<size_t>(blockIdx.x) * width;
  float sum = 0.0f;
  each_of_row(x + row, width, [&](float v) { sum += v * v; });
  sum = block_sum(sum, parts);
  write_row(out + row, x + row, weight, nullptr, width, 0.0f, rsqrtf(sum / width + eps));
}

// out[r] = (x[r] - mean) / sqrt(variance + eps) * weight + bias, of [rows, width]; weight, bias [width], bias
// may be null. The variance is the biased one, summed around the mean in a pass of its own: the difference of
// two large sums would lose it. Grid: rows.
// lint: wide >= 4, narrow <= 0
KERNEL(1024, layer_norm,
       (bf16* out, const float* x, const float* weight, const float* bias, int width, float eps)) {
  __shared__ float mean_parts[32], square_parts[32];
  const size_t row = static_cast<size_t>(blockIdx.x) * width;
  float sum = 0.0f;
  each_of_row(x + row, width, [&](float v) { sum += v; });
  const float mean = block_sum(sum, mean_parts) / width;
  float squares = 0.0f;
  each_of_row(x + row, width, [&](float v) { squares += (v - mean) * (v - mean); });
  squares = block_sum(squares, square_parts);
  write_row(out + row, x + row, weight, bias, width, mean, rsqrtf(squares / width + eps));
}
