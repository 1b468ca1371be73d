// Products of few rows with quantised weights: out = x W^T + bias, weights dequantised in registers on their
// way.
//
// Shapes: x [rows, k] in bf16, packed; out [rows, n] in f32; bias [n] or null. Weights as everywhere: q
// [n][ldq bytes], 16-byte rows; scales [n][groups], zeros [n][groups]; column c lies in group (lead + c) /
// group, group 32, 64 or 128.
//
// At few rows a product is as fast as its weights can be read, so everything serves 16-byte loads of weights
// in flight:
// - A warp owns R rows of W, and its lanes take 16 bytes of each in turn: the R loads are under way together,
// and x,
//   which comes from the first-level cache in 16-byte loads too, serves all R.
// - Numbers are made from their bits without conversions ("magic numbers", as in Marlin, Frantar et al. 2024,
// and
//   FasterTransformer's int8 kernels): a byte in the low mantissa of 2^23 is 2^23 + q, a nibble at the top of
//   the mantissa of 128 is 128 + q. For int4 the surplus is not taken off each weight but off the sum: (128 +
//   zero) * sum(x).
// - 16 bytes lie in one group when `lead` is a multiple of their number, and x's rows are aligned when k is
// one of 8; where
//   that does not hold, which no common model shape brings, a plain loop over columns is right and slow.
// Sums run in an order that depends on k, lead and the kernel's M and R, not on the other rows' values.
//
// Forerunner (bf16 scale a row or a group of 128), H100, 4096 x 11008, cold cache: int4 14.2 us for 1
// row, 25.7 for 4, 39.8 for 8; int8 17.4 (82 % of what reading alone reaches), 23 and 38; cuBLAS in bf16 36.
// These kernels themselves have not run on hardware.
#include "device.cuh"

constexpr int GEMV_THREADS = 128;

struct Product {
  float* out;
  const bf16* x;
  const unsigned char* w;
  const float* scales;
  const unsigned char* zeros;
  const float* bias;
  int rows, n, k, ldq, group, lead;
};

// Eight weights of a 16-byte load as floats, those of int4 with 128 added.
template <int BITS>
__device__ __forceinline__ void raw_weights(uint4 v, int eighth, float* out) {
  if (BITS == 8) {
    const unsigned low = (eighth ? v.z : v.x) ^ 0x80808080u, high = (eighth ? v.w : v.y) ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[i] = __uint_as_float(__byte_perm(low, 0x4B000000u, 0x7440 + i)) - 8388736.0f;  // 2^23 + 128
      out[4 + i] = __uint_as_float(__byte_perm(high, 0x4B000000u, 0x7440 + i)) - 8388736.0f;
    }
  } else {
    const unsigned q = eighth == 0 ? v.x : eighth == 1 ? v.y : eighth == 2 ? v.z : v.w;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const unsigned placed = i < 4 ? q << (16 - 4 * i) : q >> (4 * i - 16);
      out[i] = __uint_as_float((placed & 0x000f0000u) | 0x43000000u);
    }
  }
}

// One weight before its scale, wherever it lies.
template <int BITS>
__device__ __forceinline__ float one_weight(const unsigned char* row, int column, float zero) {
  if (BITS == 8) return static_cast<signed char>(row[column]);
  const unsigned pair = row[column / 2];
  return static_cast<float>(column % 2 ? pair >> 4 : pair & 15) - zero;
}

// M rows of x by R rows of W a warp.
template <int BITS, int M, int R>
__device__ __forceinline__ void multiply(const Product& p) {
  constexpr int PER_LOAD = 128 / BITS;
  const int first = (blockIdx.x * (GEMV_THREADS / 32) + warp_id()) * R;
  if (first >= p.n) return;
  const int shift = p.group == 128  ? 7
                    : p.group == 64 ? 6
                                    : 5,
            groups = (p.lead + p.k + p.group - 1) >> shift;

  const unsigned char* w[R];
  size_t scale_row[R];
  const bf16* x[M];
#pragma unroll
  for (int r = 0; r < R; r++) {  // rows past the last are computed as the last, and not written
    const int row = min(first + r, p.n - 1);
    w[r] = p.w + static_cast<size_t>(row) * p.ldq;
    scale_row[r] = static_cast<size_t>(row) * groups;
  }
#pragma unroll
  for (int m = 0; m < M; m++) x[m] = p.x + static_cast<size_t>(min(m, p.rows - 1)) * p.k;
  float sums[R][M] = {};

  if (p.k % 8 == 0 && p.lead % PER_LOAD == 0) {
#pragma unroll(M <= 2 ? 2 : 1)
    for (int at = lane_id() * PER_LOAD; at < p.k; at += 32 * PER_LOAD) {
      uint4 v[R];
      float scale[R], surplus[R];
#pragma unroll
      for (int r = 0; r < R; r++) {
        v[r] = __ldcs(reinterpret_cast<const uint4*>(w[r] + at * BITS / 8));
        const size_t group = scale_row[r] + ((p.lead + at) >> shift);
        scale[r] = __ldg(p.scales + group);
        if (BITS == 4) surplus[r] = 128.0f + (p.zeros ? static_cast<float>(__ldg(p.zeros + group)) : 8.0f);
      }
      float products[R][M] = {}, x_sums[M] = {};
#pragma unroll
      for (int eighth = 0; eighth < PER_LOAD / 8; eighth++) {
        const int column = at + 8 * eighth;
        float weights[R][8];
#pragma unroll
        for (int r = 0; r < R; r++) raw_weights<BITS>(v[r], eighth, weights[r]);
#pragma unroll
        for (int m = 0; m < M; m++) {
          float numbers[8];
          const bool here = column < p.k;  // the last load of a row may pass its end
          unpack8(here ? __ldg(reinterpret_cast<const uint4*>(x[m] + column)) : make_uint4(0, 0, 0, 0),
                  numbers);
#pragma unroll
          for (int i = 0; i < 8; i++) {
            if (BITS == 4) x_sums[m] += numbers[i];
#pragma unroll
            for (int r = 0; r < R; r++) products[r][m] += weights[r][i] * numbers[i];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; r++) {
#pragma unroll
        for (int m = 0; m < M; m++) {
          const float product = BITS == 4 ? products[r][m] - surplus[r] * x_sums[m] : products[r][m];
          sums[r][m] += product * scale[r];
        }
      }
    }
  } else {
#pragma unroll 1
    for (int column = lane_id(); column < p.k; column += 32) {
      float numbers[M];
#pragma unroll
      for (int m = 0; m < M; m++) numbers[m] = __bfloat162float(x[m][column]);
#pragma unroll
      for (int r = 0; r < R; r++) {
        const size_t group = scale_row[r] + ((p.lead + column) >> shift);
        const float zero = BITS == 4 && p.zeros ? static_cast<float>(p.zeros[group]) : 8.0f;
        const float weight = one_weight<BITS>(w[r], column, zero) * p.scales[group];
#pragma unroll
        for (int m = 0; m < M; m++) sums[r][m] += weight * numbers[m];
      }
    }
  }

#pragma unroll
  for (int r = 0; r < R; r++) {
#pragma unroll
    for (int m = 0; m < M; m++) {
      const float sum = warp_sum(sums[r][m]);
      const int row = first + r;
      if (lane_id() == 0 && row < p.n && m < p.rows) {
        p.out[static_cast<size_t>(m) * p.n + row] = sum + (p.bias ? p.bias[row] : 0.0f);
      }
    }
  }
}

// Entries: gemv_wB_rM takes up to M rows of x (a count of its own each, since registers decide how many warps
// hide the memory's latency). Rows of W a warp: 2 up to two rows of x, else 4. Grid: ceil(n / 8) for r1 and
// r2, ceil(n / 16) for r4 and r8; 128 threads. `zeros` null: 8, the middle of int4.

// lint: wide >= 12, narrow <= 3, registers <= 64
KERNEL(128, gemv_w8_r1,
       (float* out, const bf16* x, const signed char* w, const float* scales, const float* bias, int rows,
        int n, int k, int ldq, int group, int lead)) {
  multiply<8, 1, 2>({out, x, reinterpret_cast<const unsigned char*>(w), scales, nullptr, bias, rows, n, k,
                     ldq, group, lead});
}

// lint: wide >= 18, narrow <= 4, registers <= 80
KERNEL(128, gemv_w8_r2,
       (float* out, const bf16* x, const signed char* w, const float* scales, const float* bias, int rows,
        int n, int k, int ldq, int group, int lead)) {
  multiply<8, 2, 2>({out, x, reinterpret_cast<const unsigned char*>(w), scales, nullptr, bias, rows, n, k,
                     ldq, group, lead});
}

// lint: wide >= 12, narrow <= 8, registers <= 128
KERNEL(128, gemv_w8_r4,
       (float* out, const bf16* x, const signed char* w, const float* scales, const float* bias, int rows,
        int n, int k, int ldq, int group, int lead)) {
  multiply<8, 4, 4>({out, x, reinterpret_cast<const unsigned char*>(w), scales, nullptr, bias, rows, n, k,
                     ldq, group, lead});
}

// lint: wide >= 20, narrow <= 12, registers <= 184
KERNEL(128, gemv_w8_r8,
       (float* out, const bf16* x, const signed char* w, const float* scales, const float* bias, int rows,
        int n, int k, int ldq, int group, int lead)) {
  multiply<8, 8, 4>({out, x, reinterpret_cast<const unsigned char*>(w), scales, nullptr, bias, rows, n, k,
                     ldq, group, lead});
}

// lint: wide >= 18, narrow <= 14, registers <= 64
KERNEL(128, gemv_w4_r1,
       (float* out, const bf16* x, const unsigned char* w, const float* scales, const unsigned char* zeros,
        const float* bias, int rows, int n, int k, int ldq, int group, int lead)) {
  multiply<4, 1, 2>({out, x, w, scales, zeros, bias, rows, n, k, ldq, group, lead});
}

// lint: wide >= 30, narrow <= 16, registers <= 96
KERNEL(128, gemv_w4_r2,
       (float* out, const bf16* x, const unsigned char* w, const float* scales, const unsigned char* zeros,
        const float* bias, int rows, int n, int k, int ldq, int group, int lead)) {
  multiply<4, 2, 2>({out, x, w, scales, zeros, bias, rows, n, k, ldq, group, lead});
}

// lint: wide >= 20, narrow <= 24, registers <= 144
KERNEL(128, gemv_w4_r4,
       (float* out, const bf16* x, const unsigned char* w, const float* scales, const unsigned char* zeros,
        const float* bias, int rows, int n, int k, int ldq, int group, int lead)) {
  multiply<4, 4, 4>({out, x, w, scales, zeros, bias, rows, n, k, ldq, group, lead});
}

// lint: wide >= 36, narrow <= 32, registers <= 248
KERNEL(128, gemv_w4_r8,
       (float* out, const bf16* x, const unsigned char* w, const float* scales, const unsigned char* zeros,
        const float* bias, int rows, int n, int k, int ldq, int group, int lead)) {
  multiply<4, 8, 4>({out, x, w, scales, zeros, bias, rows, n, k, ldq, group, lead});
}
