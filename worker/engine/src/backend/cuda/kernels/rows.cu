// Copies of rows and columns: embedding, the rows whose logits are wanted, shards of columns.
//
// Grid: (rows, pieces); block (r, p) walks row r from its p-th piece, 256 threads, 16-byte accesses where both sides
// allow them, else number by number. Bound by memory; nothing here has run on hardware.
#include "device.cuh"

// This thread among all that walk the row, and their number.
struct Walker {
  int thread, threads;
  __device__ __forceinline__ Walker()
      : thread(blockIdx.y * blockDim.x + threadIdx.x), threads(gridDim.y * blockDim.x) {}
};

__device__ __forceinline__ float as_f32(float v) { return v; }
__device__ __forceinline__ float as_f32(bf16 v) { return __bfloat162float(v); }

// `to[i] = from[i]` of one row; `aligned`: vectors of four may be read and written.
template <class From>
__device__ __forceinline__ void copy_row(float* to, const From* from, int width, bool aligned) {
  const Walker walker;
  const int vectors = aligned ? width / 4 * 4 : 0;
  for (int at = 4 * walker.thread; at < vectors; at += 4 * walker.threads) store4(to + at, load4(from + at));
#pragma unroll 1
  for (int at = vectors + walker.thread; at < width; at += walker.threads) to[at] = as_f32(from[at]);
}

// out[r] = table[tokens[r] - first], or zeros where the token is outside first .. first + n: one rank's slice
// of the vocabulary. table [n][ld], of which k columns; out [rows, k].
// lint: wide >= 1, narrow <= 1
KERNEL(256, embed,
       (float* out, const bf16* table, const unsigned* tokens, unsigned first, int n, int k, int ld)) {
  const unsigned token = tokens[blockIdx.x] - first;  // wraps far past n where the token is below first
  out += static_cast<size_t>(blockIdx.x) * k;
  const Walker walker;
  const bool known = token < static_cast<unsigned>(n);
  const bf16* from = table + static_cast<size_t>(known ? token : 0) * ld;
  if (known && k % 8 == 0 && ld % 8 == 0) {
    for (int at = 8 * walker.thread; at < k; at += 8 * walker.threads) {
      float v[8];
      unpack8(__ldg(reinterpret_cast<const uint4*>(from + at)), v);
      store4(out + at, make_float4(v[0], v[1], v[2], v[3]));
      store4(out + at + 4, make_float4(v[4], v[5], v[6], v[7]));
    }
  } else {
#pragma unroll 1
    for (int at = walker.thread; at < k; at += walker.threads)
      out[at] = known ? __bfloat162float(from[at]) : 0.0f;
  }
}

// out[i] = x[rows[i]], rows of `width`; without `rows`, out[i] = x[first + i]. Grid: (rows wanted, pieces).
// lint: wide >= 1, narrow <= 0
KERNEL(256, gather_rows, (float* out, const float* x, const unsigned* rows, int first, int width)) {
  const size_t row = rows ? rows[blockIdx.x] : first + blockIdx.x;
  copy_row(out + static_cast<size_t>(blockIdx.x) * width, x + row * width, width, width % 4 == 0);
}

// to[r][to_first + i] = from[r][from_first + i] for i < columns; rows of to_width and from_width.
// lint: wide >= 1, narrow <= 0
KERNEL(256, copy_columns,
       (float* to, int to_width, int to_first, const float* from, int from_width, int from_first,
        int columns)) {
  const bool aligned = (to_width | to_first | from_width | from_first) % 4 == 0;
  copy_row(to + static_cast<size_t>(blockIdx.x) * to_width + to_first,
           from + static_cast<size_t>(blockIdx.x) * from_width + from_first, columns, aligned);
}

// The same from bf16, which becomes f32.
// lint: narrow <= 1
KERNEL(256, copy_columns_bf16,
       (float* to, int to_width, int to_first, const bf16* from, int from_width, int from_first,
        int columns)) {
  const bool aligned = (to_width | to_first | from_width | from_first) % 4 == 0;
  copy_row(to + static_cast<size_t>(blockIdx.x) * to_width + to_first,
           from + static_cast<size_t>(blockIdx.x) * from_width + from_first, columns, aligned);
}
