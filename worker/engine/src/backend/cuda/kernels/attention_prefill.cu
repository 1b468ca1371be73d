// Causal attention of many queries of a sequence over its paged cache, on tensor cores.
//
// Computes, for the query at position p of query head h, with the KV head h / (q_heads / kv_heads):
//   out[h] = sum_j softmax_j(scale * q[h] . k_j + slope[h] * (j - p)) * v_j   over max(0, p + 1 - window) <= j <= p
// from qkv [rows][(q_heads + 2 kv_heads) * d] (f32; only the query heads are read) and the layer's cache
// [block][K, V][kv_head][16 tokens][d] (bf16), into out [rows][q_heads * d] (bf16).
//
// Grid (tiles, q_heads), 128 threads, TileShape<d>::SHARED bytes of dynamic shared memory. A block owns 64 queries of one
// span and one head, a warp 16 of them: tiles[2t] is the span, tiles[2t + 1] the first query within it. rows[span] is the
// span's first row of qkv and out, positions[span] its first position, lens[span] its number of queries,
// tables[table_starts[span] + page] the block of its page. The host lists long tiles first: they take longest.
//
// The form is FlashAttention-2 (Dao, 2023): queries, scores, the running maximum and sum, and the output stay in
// registers; K and V go through two buffers of shared memory, filled by asynchronous copies one tile ahead, and the ids
// of the blocks after those are read a tile earlier still. Rows of shared memory are padded by 16 bytes: their length is
// an odd number of 16-byte chunks for every d, so that the eight rows of an ldmatrix lie in different banks.
//
// A query's result does not depend on the tile it is in: key tiles are aligned to absolute position and taken in
// order, and a tile of which a query sees nothing leaves its state as it is (a factor of exactly 1, or zero times zero).
// Sums and products of a row's state name their rounding (__fadd_rn), so that the compiler may not fuse them in one copy
// of the code and not in another. Keys outside the tile's visible range are never read: the copies write zeros there,
// and their scores are replaced.
//
// The forerunner (the same loop over unpaged K and V) reached 205 TFLOP/s at d 128 and 2048 tokens on an H100 SXM, and
// 265 at 8192 (FlashAttention-2 there: 214 and 320). This kernel has not run on hardware.
#include "mma.cuh"

constexpr int PREFILL_QUERIES = 64;
constexpr int PREFILL_THREADS = 128;
constexpr int PREFILL_PAGE = 16;
constexpr float PREFILL_LOG2E = 1.44269504f;

template <int D> struct TileShape {
  // Wide heads take half the keys at a time: so their output fits in registers, and two blocks on a multiprocessor.
  static constexpr int KEYS = D > 128 ? 32 : 64;
  static constexpr int PAGES = KEYS / PREFILL_PAGE;
  // Numbers a row of shared memory.
  static constexpr int LD = D + 8;
  static constexpr int TILE = KEYS * LD;
  static constexpr int SHARED = 2 * 2 * TILE * 2;
};

struct TileArgs {
  bf16* out;
  const float* qkv;
  const bf16* cache;
  const int* tiles;
  const int* rows;
  const int* positions;
  const int* lens;
  const int* tables;
  const int* table_starts;
  const float* slopes;
  int q_heads;
  int kv_heads;
  int window;
  float scale;
};

// What a thread keeps of one of its two query rows.
struct QueryRow {
  int position;
  // The last key before the window.
  int behind;
  // Scores are in units of log2, so that exp2f serves.
  float max;
  // Of this thread's keys; summed over the row's four threads at the end.
  float sum;
};

// The largest, or the sum, over the four threads of a row.
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Scores become weights; gives the factor of what was summed before.
template <int N> __device__ __forceinline__ float advance(QueryRow& row, float (&scores)[N][4], int half) {
  float largest = row.max;
#pragma unroll
  for (int t = 0; t < N; t++) largest = fmaxf(largest, fmaxf(scores[t][half], scores[t][half + 1]));
  largest = row_max(largest);
  // Nothing seen yet: all weights are zero whatever the base, but infinity minus infinity is not a number.
  float base = largest == -INFINITY ? 0.f : largest;
  float factor = exp2f(__fadd_rn(row.max, -base));
  row.max = largest;
  float sum = 0.f;
#pragma unroll
  for (int t = 0; t < N; t++) {
#pragma unroll
    for (int e = half; e < half + 2; e++) {
      scores[t][e] = exp2f(__fadd_rn(scores[t][e], -base));
      sum = __fadd_rn(sum, scores[t][e]);
    }
  }
  row.sum = __fmaf_rn(row.sum, factor, sum);
  return factor;
}

template <int D> __device__ __forceinline__ void attend_tile(bf16* shared, const TileArgs& args) {
  using Shape = TileShape<D>;
  constexpr int KEYS = Shape::KEYS, PAGES = Shape::PAGES, LD = Shape::LD;
  bf16* shared_keys = shared;
  bf16* shared_values = shared + 2 * Shape::TILE;

  int span = args.tiles[2 * blockIdx.x], first_query = args.tiles[2 * blockIdx.x + 1];
  int head = blockIdx.y, kv_head = head / (args.q_heads / args.kv_heads);
  int queries = args.lens[span];
  if (first_query >= queries) return;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int group = lane >> 2, pair = (lane & 3) * 2;

  // The thread's two rows of the warp's 16.
  int query[2] = {first_query + warp * 16 + group, first_query + warp * 16 + group + 8};
  int position = args.positions[span];
  QueryRow row[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int at = position + query[i];
    row[i] = QueryRow{at, args.window > 0 ? at - args.window : -1, -INFINITY, 0.f};
  }

  // Keys that some query of the tile sees.
  int first_position = position + first_query;
  int last_key = position + min(queries, first_query + PREFILL_QUERIES) - 1;
  int first_key = args.window > 0 ? max(0, first_position + 1 - args.window) : 0;
  int first_tile = first_key / KEYS, last_tile = last_key / KEYS;

  struct Blocks {
    int id[PAGES];
  };
  const int* table = args.tables + args.table_starts[span];
  auto blocks_of = [&](int tile) {
    Blocks blocks;
#pragma unroll
    for (int p = 0; p < PAGES; p++) {
      int page = tile * PAGES + p;
      bool visible = page >= first_key / PREFILL_PAGE && page <= last_key / PREFILL_PAGE;
      blocks.id[p] = visible ? table[page] : 0;
    }
    return blocks;
  };
  // Begins the copies of a tile: a page of one head is contiguous, 16 rows of D.
  auto copy_tile = [&](int tile, const Blocks& blocks) {
    bf16* to_keys = shared_keys + (tile & 1) * Shape::TILE;
    bf16* to_values = shared_values + (tile & 1) * Shape::TILE;
    size_t side = (size_t)args.kv_heads * PREFILL_PAGE * D;
#pragma unroll
    for (int p = 0; p < PAGES; p++) {
      const bf16* page_keys = args.cache + (size_t)blocks.id[p] * 2 * side + (size_t)kv_head * PREFILL_PAGE * D;
#pragma unroll
      for (int i = 0; i < (PREFILL_PAGE * D / 8 + PREFILL_THREADS - 1) / PREFILL_THREADS; i++) {
        int chunk = threadIdx.x + i * PREFILL_THREADS;
        if (PREFILL_PAGE * D / 8 % PREFILL_THREADS != 0 && chunk >= PREFILL_PAGE * D / 8) continue;
        int token = p * PREFILL_PAGE + chunk / (D / 8), column = chunk % (D / 8) * 8;
        int key = tile * KEYS + token;
        int bytes = key >= first_key && key <= last_key ? 16 : 0;
        cp_async_16(to_keys + token * LD + column, page_keys + chunk * 8, bytes);
        cp_async_16(to_values + token * LD + column, page_keys + side + chunk * 8, bytes);
      }
    }
    cp_async_commit();
  };

  copy_tile(first_tile, blocks_of(first_tile));
  Blocks ahead = blocks_of(min(first_tile + 1, last_tile));

  unsigned q[D / 16][4];
  size_t qkv_width = (size_t)(args.q_heads + 2 * args.kv_heads) * D;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float* from = args.qkv + (size_t)(args.rows[span] + query[half]) * qkv_width + (size_t)head * D + pair;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float2 two = query[half] < queries ? *reinterpret_cast<const float2*>(from + i * 8) : make_float2(0.f, 0.f);
      q[i / 2][half + i % 2 * 2] = pack2(two.x, two.y);
    }
  }

  float out[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
  float scale = args.scale * PREFILL_LOG2E;
  float slope = args.slopes ? args.slopes[head] * PREFILL_LOG2E : 0.f;
  int warp_first = first_position + warp * 16;

  for (int tile = first_tile; tile <= last_tile; tile++) {
    if (tile < last_tile) {
      copy_tile(tile + 1, ahead);
      ahead = blocks_of(min(tile + 2, last_tile));
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const bf16* keys = shared_keys + (tile & 1) * Shape::TILE;
    const bf16* values = shared_values + (tile & 1) * Shape::TILE;

    float scores[KEYS / 8][4];
#pragma unroll
    for (int t = 0; t < KEYS / 16; t++) {
#pragma unroll
      for (int e = 0; e < 4; e++) scores[2 * t][e] = scores[2 * t + 1][e] = 0.f;
      // Lanes 0..15 point at 8 keys, two chunks of 8 columns; lanes 16..31 at the next 8 keys.
      const bf16* from = keys + (t * 16 + (lane >> 4) * 8 + (lane & 7)) * LD + ((lane >> 3) & 1) * 8;
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        unsigned k[4];
        ldmatrix_x4(k, from + i * 16);
        mma_bf16_16816(scores[2 * t], q[i], k[0], k[1]);
        mma_bf16_16816(scores[2 * t + 1], q[i], k[2], k[3]);
      }
    }

    int first = tile * KEYS + pair;
    if (args.slopes) {
      float from_low = (float)(first - row[0].position), from_high = (float)(first - row[1].position);
#pragma unroll
      for (int t = 0; t < KEYS / 8; t++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float low = __fmul_rn(slope, from_low + (float)(t * 8 + e));
          float high = __fmul_rn(slope, from_high + (float)(t * 8 + e));
          scores[t][e] = __fmaf_rn(scores[t][e], scale, low);
          scores[t][e + 2] = __fmaf_rn(scores[t][e + 2], scale, high);
        }
      }
    } else {
#pragma unroll
      for (int t = 0; t < KEYS / 8; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) scores[t][e] = __fmul_rn(scores[t][e], scale);
    }
    bool some_after = tile * KEYS + KEYS - 1 > warp_first;
    bool some_behind = args.window > 0 && tile * KEYS <= warp_first + 15 - args.window;
    if (some_after || some_behind) {
#pragma unroll
      for (int t = 0; t < KEYS / 8; t++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const QueryRow& r = row[e / 2];
          int key = first + t * 8 + e % 2;
          bool visible = key <= r.position && key > r.behind;
          scores[t][e] = visible ? scores[t][e] : -INFINITY;
        }
      }
    }

    float factor[2] = {advance(row[0], scores, 0), advance(row[1], scores, 2)};
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) out[i][e] *= factor[e / 2];

    // The layout of two 16x8 results is that of one 16x16 left operand: weights need no exchange.
#pragma unroll
    for (int t = 0; t < KEYS / 16; t++) {
      unsigned weights[4] = {
          pack2(scores[2 * t][0], scores[2 * t][1]), pack2(scores[2 * t][2], scores[2 * t][3]),
          pack2(scores[2 * t + 1][0], scores[2 * t + 1][1]), pack2(scores[2 * t + 1][2], scores[2 * t + 1][3])};
      const bf16* from = values + (t * 16 + (lane & 15)) * LD + (lane >> 4) * 8;
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        unsigned v[4];
        ldmatrix_x4_trans(v, from + i * 16);
        mma_bf16_16816(out[2 * i], weights, v[0], v[1]);
        mma_bf16_16816(out[2 * i + 1], weights, v[2], v[3]);
      }
    }
    // All have read this buffer before the copies of the tile after the next write to it.
    __syncthreads();
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    float inverse = 1.f / row_sum(row[half].sum);
    if (query[half] >= queries) continue;
    bf16* to = args.out + ((size_t)(args.rows[span] + query[half]) * args.q_heads + head) * D + pair;
#pragma unroll
    for (int i = 0; i < D / 8; i++)
      *reinterpret_cast<unsigned*>(to + i * 8) = pack2(out[i][2 * half] * inverse, out[i][2 * half + 1] * inverse);
  }
}

KERNEL(128, attend_tile_d16, (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows, const int* positions, const int* lens, const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<16>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale});
}

KERNEL(128, attend_tile_d32, (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows, const int* positions, const int* lens, const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<32>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale});
}

KERNEL(128, attend_tile_d64, (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows, const int* positions, const int* lens, const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<64>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale});
}

KERNEL(128, attend_tile_d80, (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows, const int* positions, const int* lens, const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<80>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale});
}

KERNEL(128, attend_tile_d96, (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows, const int* positions, const int* lens, const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<96>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale});
}

KERNEL(128, attend_tile_d112, (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows, const int* positions, const int* lens, const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<112>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale});
}

KERNEL(128, attend_tile_d128, (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows, const int* positions, const int* lens, const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<128>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale});
}

KERNEL(128, attend_tile_d256, (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows, const int* positions, const int* lens, const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<256>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts, slopes, q_heads, kv_heads, window, scale});
}
