// Quantised weights back to bf16, for products of many rows: the scratch matrix then goes through cuBLAS.
//
// Shapes: q [n][ldq bytes], scales [n][groups], zeros [n][groups] or null, column c in group (lead + c) /
// group, as in gemv.cu; out [n][ld] in bf16, ld a multiple of 8 and at least k; columns k .. ld become 0.
// Grid: (n, pieces), 256 threads; block (r, p) walks row r from its p-th piece, a thread makes eight numbers at a time: the
// block reads and writes one unbroken stretch of memory. The writes, two or four times what is read, set the
// time.
//
// Forerunner (one thread made 16 or 32 numbers), H100, 4096 x 11008, product included: 107 us for int4, 89
// for int8, against 36 in bf16 at any row count up to 128: right for prefill, slow for decode. These kernels
// themselves have not run on hardware.
#include "device.cuh"

// `weight(column, group)` is the dequantised number; `weights(column, group, out)` makes eight that lie in
// one group.
template <class One, class Eight>
__device__ __forceinline__ void dequantise(bf16* out, int k, int ld, int group, int lead, One weight,
                                           Eight weights) {
  const int shift = group == 128 ? 7 : group == 64 ? 6 : 5, groups = (lead + k + group - 1) >> shift;
  const size_t first_group = static_cast<size_t>(blockIdx.x) * groups;
  out += static_cast<size_t>(blockIdx.x) * ld;
  const int stride = 8 * gridDim.y * blockDim.x;
  for (int at = 8 * (blockIdx.y * blockDim.x + threadIdx.x); at < ld; at += stride) {
    float numbers[8];
    if (lead % 8 == 0 && at + 8 <= k) {
      weights(at, first_group + ((lead + at) >> shift), numbers);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        numbers[i] = at + i < k ? weight(at + i, first_group + ((lead + at + i) >> shift)) : 0.0f;
      }
    }
    *reinterpret_cast<uint4*>(out + at) = pack8(numbers);
  }
}

// out = scale * q of int8 weights.
// lint: narrow <= 8, registers <= 64
KERNEL(256, dequant_w8,
       (bf16* out, const signed char* w, const float* scales, int n, int k, int ldq, int ld, int group,
        int lead)) {
  if (blockIdx.x >= static_cast<unsigned>(n)) return;
  const signed char* row = w + static_cast<size_t>(blockIdx.x) * ldq;
  const auto weight = [&](int column, size_t of_group) { return row[column] * scales[of_group]; };
  const auto weights = [&](int column, size_t of_group, float* numbers) {
    const uint2 v = __ldcs(reinterpret_cast<const uint2*>(row + column));
    const float scale = scales[of_group];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      numbers[i] = static_cast<float>(static_cast<signed char>(v.x >> (8 * i))) * scale;
      numbers[4 + i] = static_cast<float>(static_cast<signed char>(v.y >> (8 * i))) * scale;
    }
  };
  dequantise(out, k, ld, group, lead, weight, weights);
}

// out = scale * (q - zero) of int4 weights, the low nibble the even column; `zeros` null: 8.
// lint: narrow <= 25, registers <= 64
KERNEL(256, dequant_w4,
       (bf16* out, const unsigned char* w, const float* scales, const unsigned char* zeros, int n, int k,
        int ldq, int ld, int group, int lead)) {
  if (blockIdx.x >= static_cast<unsigned>(n)) return;
  const unsigned char* row = w + static_cast<size_t>(blockIdx.x) * ldq;
  const auto zero = [&](size_t of_group) { return zeros ? static_cast<int>(zeros[of_group]) : 8; };
  const auto weight = [&](int column, size_t of_group) {
    const int q = column % 2 ? row[column / 2] >> 4 : row[column / 2] & 15;
    return static_cast<float>(q - zero(of_group)) * scales[of_group];
  };
  const auto weights = [&](int column, size_t of_group, float* numbers) {
    const unsigned v = __ldcs(reinterpret_cast<const unsigned*>(row + column / 2));
    const float scale = scales[of_group];
    const int middle = zero(of_group);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      numbers[i] = static_cast<float>(static_cast<int>(v >> (4 * i) & 15) - middle) * scale;
    }
  };
  dequantise(out, k, ld, group, lead, weight, weights);
}
