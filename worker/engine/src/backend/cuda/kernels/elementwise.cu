// Ops that treat each number by itself. Bound by memory: 16-byte loads and stores, four numbers a thread and
// turn.
//
// Flat ops take n numbers, any grid of 256 threads (n / 1024 blocks fill a turn). Ops on rows take grid
// (rows, pieces): block (r, p) walks row r from column 4 * 256 * p. Rows whose width is no multiple of four
// go number by number.
//
// On an H100 plain copies of this form read and wrote 2.9 TB/s, 91 % of what reading alone reached. These
// kernels themselves have not run on hardware.
#include "device.cuh"

// `x[i] = f(x[i])` over n numbers.
template <class F>
__device__ __forceinline__ void map(float* x, long long n, F f) {
  for (long long at = first_of_four(); at < n; at += stride_of_four()) {
    if (at + 4 <= n) {
      float4 v = load4(x + at);
      store4(x + at, make_float4(f(v.x), f(v.y), f(v.z), f(v.w)));
    } else {
      for (long long i = at; i < n; i++) x[i] = f(x[i]);
    }
  }
}

// x += y over n numbers.
// lint: wide >= 2, narrow <= 0
KERNEL(256, add, (float* x, const float* y, long long n)) {
  for (long long at = first_of_four(); at < n; at += stride_of_four()) {
    if (at + 4 <= n) {
      float4 a = load4(x + at), b = load4(y + at);
      store4(x + at, make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w));
    } else {
      for (long long i = at; i < n; i++) x[i] += y[i];
    }
  }
}

// x = min(max(x, -limit), limit) over n numbers; NaN stays, so that a fault is not hidden.
// lint: wide >= 1, narrow <= 0
KERNEL(256, clamp, (float* x, long long n, float limit)) {
  map(x, n, [=](float v) { return v < -limit ? -limit : v > limit ? limit : v; });
}

// x *= factor over n numbers; a factor of 0 gives zeros, whatever x held.
// lint: wide >= 1, narrow <= 0
KERNEL(256, scale, (float* x, long long n, float factor)) {
  map(x, n, [=](float v) { return factor == 0.0f ? 0.0f : v * factor; });
}

// x = x / 2 * (1 + erf(x / sqrt(2))) over n numbers.
// lint: wide >= 1, narrow <= 0
KERNEL(256, gelu, (float* x, long long n)) {
  map(x, n, [](float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); });
}

// out = x rounded to bf16 (to nearest, ties to even), n numbers.
// lint: wide >= 1, narrow <= 0
KERNEL(256, to_bf16, (bf16* out, const float* x, long long n)) {
  for (long long at = first_of_four(); at < n; at += stride_of_four()) {
    if (at + 4 <= n) {
      store4(out + at, load4(x + at));
    } else {
      for (long long i = at; i < n; i++) out[i] = __float2bfloat16(x[i]);
    }
  }
}

__device__ __forceinline__ float silu(float z) { return z / (1.0f + __expf(-z)); }

// out[r][i] = silu(gate_up[r][i]) * gate_up[r][width + i]; gate_up [rows, 2 * width], out [rows, width] in
// bf16, since a product reads it. Grid: (rows, pieces).
// lint: wide >= 2, narrow <= 0
KERNEL(256, silu_mul, (bf16* out, const float* gate_up, int rows, int width)) {
  const int row = blockIdx.x;
  if (row >= rows) return;
  const float* gate = gate_up + static_cast<size_t>(row) * 2 * width;
  const float* up = gate + width;
  out += static_cast<size_t>(row) * width;
  const int thread = blockIdx.y * blockDim.x + threadIdx.x, threads = gridDim.y * blockDim.x;
  if (width % 4 == 0) {
    for (int at = 4 * thread; at < width; at += 4 * threads) {
      float4 g = load4(gate + at), u = load4(up + at);
      store4(out + at, make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w));
    }
  } else {
#pragma unroll 1
    for (int at = thread; at < width; at += threads) out[at] = __float2bfloat16(silu(gate[at]) * up[at]);
  }
}

// x[r] += bias, of [rows, width]; bias [width]. Grid: (rows, pieces).
// lint: wide >= 2, narrow <= 0
KERNEL(256, add_bias, (float* x, const float* bias, int rows, int width)) {
  const int row = blockIdx.x;
  if (row >= rows) return;
  x += static_cast<size_t>(row) * width;
  const int thread = blockIdx.y * blockDim.x + threadIdx.x, threads = gridDim.y * blockDim.x;
  if (width % 4 == 0) {
    for (int at = 4 * thread; at < width; at += 4 * threads) {
      float4 v = load4(x + at), b = load4(bias + at);
      store4(x + at, make_float4(v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w));
    }
  } else {
#pragma unroll 1
    for (int at = thread; at < width; at += threads) x[at] += bias[at];
  }
}
