// The product of activations with a weight matrix on tensor cores, adding over k in one order whatever the
// rows.
//
// Computes out[r][i] = sum_j x[r][j] * w[i][j] + bias[i], of x [rows][ldx] (bf16), w [n][k] and out [rows][n]
// (f32); `bias` may be null. gemm_bf16 takes w as [n][ldw] bf16 with ldw a multiple of 8. gemm_w8 and gemm_w4
// take the quantised form: w = scale * (q - zero), rounded to bf16, with q row-major [n][ldq bytes] (ldq a
// multiple of 16), int8 (zero 0) or unsigned nibbles, the even column low; scales, and zeros for int4 (null:
// 8), are [n][groups] with column j in group (lead + j) / group, groups = ceil((lead + k) / group). They give
// the bits of dequantising and gemm_bf16.
//
// Grid (ceil(rows / 64), ceil(n / 64)), 128 threads, GEMM_{BF16,W8,W4}_SHARED bytes of dynamic shared memory.
// A block owns 64 x 64 results, a warp 32 x 32. Tiles of 64 columns of x and w come through a ring of four
// stages of shared memory by asynchronous copies, the multistage form of CUTLASS for sm_80; quantised weights
// lie in the ring as they are and are widened into one more tile, the scales read a step ahead. Rows of bf16
// tiles are padded by 16 bytes, so that the eight rows of an ldmatrix lie in different banks.
//
// A result is one chain of mma over k, 16 columns a link: no split over k, and rows of other results never
// enter. Past the edges of x and w the copies write zeros; blocks of 16 rows that lie wholly past the last
// row are left out. A row of x that is not aligned to 16 bytes (ldx not a multiple of 8) is copied number by
// number.
//
// This kernel has not run on hardware, and no forerunner has.
#include "mma.cuh"

constexpr int GEMM_TILE = 64;
constexpr int GEMM_THREADS = 128;
constexpr int GEMM_STAGES = 4;
// Numbers a row of a bf16 tile in shared memory.
constexpr int GEMM_LD = GEMM_TILE + 8;
constexpr int GEMM_TILE_BYTES = GEMM_TILE * GEMM_LD * 2;

constexpr int GEMM_BF16_SHARED = GEMM_STAGES * 2 * GEMM_TILE_BYTES;
constexpr int GEMM_W8_SHARED = GEMM_STAGES * (GEMM_TILE_BYTES + GEMM_TILE * GEMM_TILE) + GEMM_TILE_BYTES;
constexpr int GEMM_W4_SHARED = GEMM_STAGES * (GEMM_TILE_BYTES + GEMM_TILE * GEMM_TILE / 2) + GEMM_TILE_BYTES;

struct Product {
  float* out;
  const bf16* x;
  const float* bias;
  int rows;
  int n;
  int k;
  int ldx;
};

__device__ __forceinline__ int bytes_of_chunk(int bytes_left) { return max(0, min(16, bytes_left)); }

// bf16 weights: a stage is the tile itself.
struct DenseWeights {
  static constexpr int STAGE_BYTES = GEMM_TILE_BYTES;
  static constexpr int SHARED = GEMM_BF16_SHARED;

  const bf16* w;
  int ldw;

  __device__ __forceinline__ void copy(unsigned char* stage, int first_row, int n, int first_column,
                                       int k) const {
#pragma unroll
    for (int i = 0; i < GEMM_TILE * GEMM_TILE / 8 / GEMM_THREADS; i++) {
      int chunk = threadIdx.x + i * GEMM_THREADS, row = chunk / 8, column = chunk % 8 * 8;
      int bytes = first_row + row < n ? bytes_of_chunk((k - first_column - column) * 2) : 0;
      const bf16* from = bytes > 0 ? w + (size_t)(first_row + row) * ldw + first_column + column : w;
      cp_async_16(reinterpret_cast<bf16*>(stage) + row * GEMM_LD + column, from, bytes);
    }
  }

  __device__ __forceinline__ void prepare(int, int, int, int) {}

  __device__ __forceinline__ const bf16* tile(const unsigned char* stage, bf16*) const {
    return reinterpret_cast<const bf16*>(stage);
  }
};

// Quantised weights of BITS 8 or 4: a thread widens 32 columns of one row of the tile.
template <int BITS>
struct QuantisedWeights {
  static constexpr int ROW_BYTES = GEMM_TILE * BITS / 8;
  static constexpr int STAGE_BYTES = GEMM_TILE * ROW_BYTES;
  static constexpr int SHARED = BITS == 8 ? GEMM_W8_SHARED : GEMM_W4_SHARED;
  static constexpr int RUN = 32;
  static constexpr int WORDS = RUN * BITS / 32;
  // The f32 with these bits plus u is 2^23 + u for u below 2^23: widening without a conversion.
  static constexpr unsigned MAGIC = 0x4b000000u;

  const unsigned char* w;
  const float* scales;
  const unsigned char* zeros;
  int ldq;
  int group_shift;
  int lead;

  // Of the thread's next run: its two groups at most (a group has 32 columns or more), and the columns in the
  // first.
  float scale[2];
  float zero[2];
  int first_columns;

  __device__ __forceinline__ void copy(unsigned char* stage, int first_row, int n, int first_column,
                                       int k) const {
    constexpr int CHUNKS = ROW_BYTES / 16;
    int row_bytes = (k * BITS + 7) / 8, first_byte = first_column * BITS / 8;
#pragma unroll
    for (int i = 0; i < GEMM_TILE * CHUNKS / GEMM_THREADS; i++) {
      int chunk = threadIdx.x + i * GEMM_THREADS, row = chunk / CHUNKS, byte = chunk % CHUNKS * 16;
      int bytes = first_row + row < n ? bytes_of_chunk(row_bytes - first_byte - byte) : 0;
      const unsigned char* from = bytes > 0 ? w + (size_t)(first_row + row) * ldq + first_byte + byte : w;
      cp_async_16(stage + row * ROW_BYTES + byte, from, bytes);
    }
  }

  // Begins to read the scales of the tile at `first_column`; columns past k take the last group's, for x is
  // zero there.
  __device__ __forceinline__ void prepare(int first_row, int n, int first_column, int k) {
    int row = min(first_row + (int)threadIdx.x / 2, n - 1), column = first_column + threadIdx.x % 2 * RUN;
    int groups = ((lead + k - 1) >> group_shift) + 1, group = (lead + column) >> group_shift;
    first_columns = ((group + 1) << group_shift) - lead - column;
#pragma unroll
    for (int side = 0; side < 2; side++) {
      size_t at = (size_t)row * groups + min(group + side, groups - 1);
      scale[side] = __ldg(scales + at);
      float value = BITS == 8 ? 128.f : zeros ? (float)__ldg(zeros + at) : 8.f;
      zero[side] = __uint_as_float(MAGIC) + value;
    }
  }

  // A run whose second group, if TWO_GROUPS, begins at column `first_columns`.
  template <bool TWO_GROUPS>
  __device__ __forceinline__ void widen(const unsigned (&words)[WORDS], uint4* to) const {
    constexpr int PER_WORD = 32 / BITS;
#pragma unroll
    for (int chunk = 0; chunk < RUN / 8; chunk++) {
      float numbers[8];
#pragma unroll
      for (int e = 0; e < 8; e++) {
        int column = chunk * 8 + e;
        unsigned word = words[column / PER_WORD];
        // An int8 plus 128 is unsigned: its sign bit flipped.
        if (BITS == 8) word ^= 0x80808080u;
        unsigned number = word >> (column % PER_WORD * BITS) & ((1u << BITS) - 1);
        bool second = TWO_GROUPS && column >= first_columns;
        float exact = __uint_as_float(MAGIC | number) - (second ? zero[1] : zero[0]);
        numbers[e] = exact * (second ? scale[1] : scale[0]);
      }
      to[chunk] = pack8(numbers);
    }
  }

  __device__ __forceinline__ const bf16* tile(const unsigned char* stage, bf16* wide) const {
    int row = threadIdx.x / 2, half = threadIdx.x % 2;
    const uint4* from = reinterpret_cast<const uint4*>(stage + row * ROW_BYTES + half * (RUN * BITS / 8));
    unsigned words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS / 4; i++) {
      uint4 four = from[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
    uint4* to = reinterpret_cast<uint4*>(wide + row * GEMM_LD + half * RUN);
    if (first_columns >= RUN)
      widen<false>(words, to);
    else
      widen<true>(words, to);
    __syncthreads();
    return wide;
  }
};

// Copies columns first_column .. +64 of up to 64 rows of x, zeros past the edges.
__device__ __forceinline__ void copy_x(bf16* stage, const Product& product, int first_row, int first_column) {
  bool aligned = product.ldx % 8 == 0;
#pragma unroll
  for (int i = 0; i < GEMM_TILE / 16; i++) {
    if (first_row + i * 16 >= product.rows) break;
    int row = threadIdx.x / 8 + i * 16, column = threadIdx.x % 8 * 8;
    int left = first_row + row < product.rows ? product.k - first_column - column : 0;
    bf16* to = stage + row * GEMM_LD + column;
    const bf16* from =
        left > 0 ? product.x + (size_t)(first_row + row) * product.ldx + first_column + column : product.x;
    if (aligned) {
      cp_async_16(to, from, bytes_of_chunk(left * 2));
    } else {
      float numbers[8];
#pragma unroll
      for (int e = 0; e < 8; e++) numbers[e] = e < left ? __bfloat162float(from[e]) : 0.f;
      *reinterpret_cast<uint4*>(to) = pack8(numbers);
    }
  }
}

template <class Weights>
__device__ __forceinline__ void gemm(unsigned char* shared, const Product& product, Weights weights) {
  constexpr int STAGE_BYTES = GEMM_TILE_BYTES + Weights::STAGE_BYTES;
  static_assert(GEMM_STAGES * STAGE_BYTES <= Weights::SHARED, "the ring fits");
  int first_row = blockIdx.x * GEMM_TILE, first_column = blockIdx.y * GEMM_TILE;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  int steps = (product.k + GEMM_TILE - 1) / GEMM_TILE;
  bf16* wide = reinterpret_cast<bf16*>(shared + GEMM_STAGES * STAGE_BYTES);

  auto stage_of = [&](int step) { return shared + step % GEMM_STAGES * STAGE_BYTES; };
  // A group of copies for every step, though it be empty: so the count of groups is the count of steps.
  auto copy = [&](int step) {
    if (step < steps) {
      unsigned char* stage = stage_of(step);
      copy_x(reinterpret_cast<bf16*>(stage), product, first_row, step * GEMM_TILE);
      weights.copy(stage + GEMM_TILE_BYTES, first_column, product.n, step * GEMM_TILE, product.k);
    }
    cp_async_commit();
  };

  float sums[2][4][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][j][e] = 0.f;

#pragma unroll
  for (int step = 0; step < GEMM_STAGES - 1; step++) copy(step);
  weights.prepare(first_column, product.n, 0, product.k);
  for (int step = 0; step < steps; step++) {
    cp_async_wait<GEMM_STAGES - 2>();
    // The step's stage is there for all, and all are done with the stage and the wide tile of the step
    // before.
    __syncthreads();
    copy(step + GEMM_STAGES - 1);
    const unsigned char* stage = stage_of(step);
    const bf16* x = reinterpret_cast<const bf16*>(stage);
    const bf16* w = weights.tile(stage + GEMM_TILE_BYTES, wide);
    if (step + 1 < steps) weights.prepare(first_column, product.n, (step + 1) * GEMM_TILE, product.k);

    const bf16* x_lane = x + (warp_row + (lane & 15)) * GEMM_LD + (lane >> 4) * 8;
    const bf16* w_lane = w + (warp_column + (lane >> 4) * 8 + (lane & 7)) * GEMM_LD + ((lane >> 3) & 1) * 8;
#pragma unroll
    for (int link = 0; link < GEMM_TILE; link += 16) {
      unsigned b[2][4];
#pragma unroll
      for (int j = 0; j < 2; j++) ldmatrix_x4(b[j], w_lane + j * 16 * GEMM_LD + link);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (first_row + warp_row + i * 16 >= product.rows) continue;
        unsigned a[4];
        ldmatrix_x4(a, x_lane + i * 16 * GEMM_LD + link);
#pragma unroll
        for (int j = 0; j < 4; j++)
          mma_bf16_16816(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = first_row + warp_row + i * 16 + half * 8 + (lane >> 2);
      if (row >= product.rows) continue;
      float* to = product.out + (size_t)row * product.n;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int column = first_column + warp_column + j * 8 + (lane & 3) * 2;
        float low = sums[i][j][2 * half], high = sums[i][j][2 * half + 1];
        if (product.bias && column < product.n) low += product.bias[column];
        if (product.bias && column + 1 < product.n) high += product.bias[column + 1];
        if (product.n % 2 == 0 && column < product.n) {
          *reinterpret_cast<float2*>(to + column) = make_float2(low, high);
        } else {
          if (column < product.n) to[column] = low;
          if (column + 1 < product.n) to[column + 1] = high;
        }
      }
    }
  }
}

__device__ __forceinline__ int shift_of_group(int group) { return group == 32 ? 5 : group == 64 ? 6 : 7; }

KERNEL(128, gemm_bf16,
       (float* out, const bf16* x, const bf16* w, const float* bias, int rows, int n, int k, int ldx,
        int ldw)) {
  DYNAMIC_SHARED(unsigned char, shared);
  gemm(shared, Product{out, x, bias, rows, n, k, ldx}, DenseWeights{w, ldw});
}

KERNEL(128, gemm_w8,
       (float* out, const bf16* x, const signed char* w, const float* scales, const float* bias, int rows,
        int n, int k, int ldx, int ldq, int group, int lead)) {
  DYNAMIC_SHARED(unsigned char, shared);
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(w);
  QuantisedWeights<8> weights{bytes, scales, nullptr, ldq, shift_of_group(group), lead, {}, {}, 0};
  gemm(shared, Product{out, x, bias, rows, n, k, ldx}, weights);
}

KERNEL(128, gemm_w4,
       (float* out, const bf16* x, const unsigned char* w, const float* scales, const unsigned char* zeros,
        const float* bias, int rows, int n, int k, int ldx, int ldq, int group, int lead)) {
  DYNAMIC_SHARED(unsigned char, shared);
  QuantisedWeights<4> weights{w, scales, zeros, ldq, shift_of_group(group), lead, {}, {}, 0};
  gemm(shared, Product{out, x, bias, rows, n, k, ldx}, weights);
}
