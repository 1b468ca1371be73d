// Causal attention of many queries of a sequence over its paged cache, on tensor cores.
//
// Computes, for the query at position p of query head h, with the KV head h / (q_heads / kv_heads) and over
// the keys max(0, p + 1 - window) <= j <= p:
//   out[h] = sum_j softmax_j(scale * q[h] . k_j + slope[h] * (j - p)) * v_j
// from qkv [rows][(q_heads + 2 kv_heads) * d] (f32; only the query heads are read) and the layer's cache
// [block][K, V][kv_head][16 tokens][d] (bf16), into out [rows][q_heads * d] (bf16).
//
// Grid (tiles, q_heads), 128 threads, TileShape<d>::SHARED bytes of dynamic shared memory. A block owns 64
// queries of one span and one head, a warp 16 of them: tiles[2t] is the span, tiles[2t + 1] the first query
// within it. rows[span] is the span's first row of qkv and out, positions[span] its first position,
// lens[span] its number of queries (0: padding, nothing is written), tables[table_starts[span] + page] the
// block of its page. Tiles may come in any order; those that see most keys are best listed first.
//
// The form is FlashAttention-2 (Dao, 2023): queries, scores, the running maximum and sum, and the output stay
// in registers; K and V go through two buffers of shared memory, filled by asynchronous copies one tile
// ahead, and the ids of the blocks after those are read a tile earlier still. Rows of shared memory are
// padded by 16 bytes: their length is an odd number of 16-byte chunks for every d, so that the eight rows of
// an ldmatrix lie in different banks.
//
// A query's result does not depend on the tile it is in: key tiles are aligned to absolute position and taken
// in order, and a tile of which a query sees nothing leaves its state as it is (a factor of exactly 1, or
// zero times zero). Sums and products of a row's state name their rounding (__fadd_rn), so that the compiler
// may not fuse them in one copy of the code and not in another. Keys outside the tile's visible range are
// never read: the copies write zeros there, and their scores are replaced. A key or value that is itself not
// a number may spoil earlier queries of its tile: zero times it is none. All of them are of one sequence.
//
// The forerunner (the same loop over unpaged K and V) reached 205 TFLOP/s at d 128 and 2048 tokens on an H100
// SXM, and 265 at 8192 (FlashAttention-2 there: 214 and 320). This kernel has not run on hardware.
#include "mma.cuh"

constexpr int PREFILL_QUERIES = 64;
constexpr int PREFILL_THREADS = 128;
constexpr int PREFILL_PAGE = 16;
constexpr float PREFILL_LOG2E = 1.44269504f;

template <int D>
struct TileShape {
  // Wide heads take half the keys at a time: so their output fits in registers, and two blocks on a
  // multiprocessor.
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

// Scores of a warp's 16 queries and N * 8 keys, as mma leaves them: [t][0], [t][1] are of the thread's first
// row and keys 8t + 2q, 8t + 2q + 1; [t][2], [t][3] of its second row, 8 below.
template <int N>
using Scores = float[N][4];

// What a thread keeps of one of its two query rows.
struct QueryRow {
  // Within the span.
  int query;
  int position;
  // The last key before the window.
  int behind;
  // In units of log2, so that exp2f serves.
  float max;
  // Of the weights of this thread's keys; the row's four threads add theirs up at the end.
  float sum;
};

// The keys that some query of the tile sees, and how their pages come to shared memory.
template <int D>
struct KeyTiles {
  using Shape = TileShape<D>;

  bf16* keys;
  bf16* values;
  // Page 0 of block 0 of this KV head: its keys, and its values `side` numbers behind them.
  const bf16* cache;
  size_t side;
  const int* table;
  int first_key;
  int last_key;

  struct Blocks {
    int id[Shape::PAGES];
  };

  __device__ __forceinline__ Blocks blocks_of(int tile) const {
    Blocks blocks;
#pragma unroll
    for (int p = 0; p < Shape::PAGES; p++) {
      int page = tile * Shape::PAGES + p;
      bool visible = page >= first_key / PREFILL_PAGE && page <= last_key / PREFILL_PAGE;
      blocks.id[p] = visible ? table[page] : 0;
    }
    return blocks;
  }

  __device__ __forceinline__ const bf16* keys_of(int tile) const { return keys + (tile & 1) * Shape::TILE; }
  __device__ __forceinline__ const bf16* values_of(int tile) const {
    return values + (tile & 1) * Shape::TILE;
  }

  // Begins the copies of a tile. A page of one head is contiguous, 16 rows of D; past the visible keys come
  // zeros.
  __device__ __forceinline__ void copy(int tile, const Blocks& blocks) {
    constexpr int CHUNKS_ROW = D / 8, CHUNKS_PAGE = PREFILL_PAGE * CHUNKS_ROW;
    bf16* to_keys = keys + (tile & 1) * Shape::TILE;
    bf16* to_values = values + (tile & 1) * Shape::TILE;
#pragma unroll
    for (int p = 0; p < Shape::PAGES; p++) {
      const bf16* page = cache + (size_t)blocks.id[p] * 2 * side;
#pragma unroll
      for (int first = 0; first < CHUNKS_PAGE; first += PREFILL_THREADS) {
        int chunk = first + threadIdx.x;
        if (first + PREFILL_THREADS > CHUNKS_PAGE && chunk >= CHUNKS_PAGE) continue;
        int token = p * PREFILL_PAGE + chunk / CHUNKS_ROW, column = chunk % CHUNKS_ROW * 8;
        int key = tile * Shape::KEYS + token;
        int bytes = key >= first_key && key <= last_key ? 16 : 0;
        cp_async_16(to_keys + token * Shape::LD + column, page + chunk * 8, bytes);
        cp_async_16(to_values + token * Shape::LD + column, page + side + chunk * 8, bytes);
      }
    }
    cp_async_commit();
  }
};

// The warp's queries as left operands, 16 columns each.
template <int D>
__device__ __forceinline__ void load_queries(unsigned (&q)[D / 16][4], const TileArgs& args, int span,
                                             const QueryRow (&rows)[2], int pair) {
  int queries = args.lens[span];
  size_t width = (size_t)(args.q_heads + 2 * args.kv_heads) * D;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    bool exists = rows[half].query < queries;
    const float* from =
        args.qkv + (args.rows[span] + rows[half].query) * width + (size_t)blockIdx.y * D + pair;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      float2 two = make_float2(0.f, 0.f);
      if (exists) two = *reinterpret_cast<const float2*>(from + i * 8);
      q[i / 2][half + i % 2 * 2] = pack2(two.x, two.y);
    }
  }
}

template <int D>
__device__ __forceinline__ void multiply_keys(Scores<TileShape<D>::KEYS / 8>& scores,
                                              const unsigned (&q)[D / 16][4], const bf16* keys, int lane) {
#pragma unroll
  for (int t = 0; t < TileShape<D>::KEYS / 16; t++) {
#pragma unroll
    for (int e = 0; e < 4; e++) scores[2 * t][e] = scores[2 * t + 1][e] = 0.f;
    // Lanes 0..16 point at 8 keys, two chunks of 8 columns; lanes 16..32 at the next 8 keys.
    const bf16* from =
        keys + (t * 16 + (lane >> 4) * 8 + (lane & 7)) * TileShape<D>::LD + ((lane >> 3) & 1) * 8;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      unsigned k[4];
      ldmatrix_x4(k, from + i * 16);
      mma_bf16_16816(scores[2 * t], q[i], k[0], k[1]);
      mma_bf16_16816(scores[2 * t + 1], q[i], k[2], k[3]);
    }
  }
}

template <int N>
__device__ __forceinline__ void scale_scores(Scores<N>& scores, float scale) {
#pragma unroll
  for (int t = 0; t < N; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) scores[t][e] = __fmul_rn(scores[t][e], scale);
}

// The same with a slope; `first_key` is the thread's first.
template <int N>
__device__ __forceinline__ void scale_scores(Scores<N>& scores, float scale, float slope,
                                             const QueryRow (&rows)[2], int first_key) {
  float distance[2] = {(float)(first_key - rows[0].position), (float)(first_key - rows[1].position)};
#pragma unroll
  for (int t = 0; t < N; t++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float bias = __fmul_rn(slope, distance[e / 2] + (float)(t * 8 + e % 2));
      scores[t][e] = __fmaf_rn(scores[t][e], scale, bias);
    }
  }
}

template <int N>
__device__ __forceinline__ void mask_scores(Scores<N>& scores, const QueryRow (&rows)[2], int first_key) {
#pragma unroll
  for (int t = 0; t < N; t++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int key = first_key + t * 8 + e % 2;
      bool visible = key <= rows[e / 2].position && key > rows[e / 2].behind;
      scores[t][e] = visible ? scores[t][e] : -INFINITY;
    }
  }
}

// The largest, or the sum, over the four threads of a row.
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(WARP_ALL, value, 1));
  return fmaxf(value, __shfl_xor_sync(WARP_ALL, value, 2));
}

__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(WARP_ALL, value, 1);
  return value + __shfl_xor_sync(WARP_ALL, value, 2);
}

// Scores of one row (columns `half`, `half` + 1) become weights; gives the factor of what was summed before.
template <int N>
__device__ __forceinline__ float advance(QueryRow& row, Scores<N>& scores, int half) {
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

// out += weights * values. Two results of 16x8 lie as one left operand of 16x16: weights need no exchange.
template <int D>
__device__ __forceinline__ void multiply_values(float (&out)[D / 8][4],
                                                const Scores<TileShape<D>::KEYS / 8>& weights,
                                                const bf16* values, int lane) {
#pragma unroll
  for (int t = 0; t < TileShape<D>::KEYS / 16; t++) {
    const float(&low)[4] = weights[2 * t];
    const float(&high)[4] = weights[2 * t + 1];
    unsigned w[4] = {pack2(low[0], low[1]), pack2(low[2], low[3]), pack2(high[0], high[1]),
                     pack2(high[2], high[3])};
    const bf16* from = values + (t * 16 + (lane & 15)) * TileShape<D>::LD + (lane >> 4) * 8;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      unsigned v[4];
      ldmatrix_x4_trans(v, from + i * 16);
      mma_bf16_16816(out[2 * i], w, v[0], v[1]);
      mma_bf16_16816(out[2 * i + 1], w, v[2], v[3]);
    }
  }
}

template <int D>
__device__ __forceinline__ void attend_tile(bf16* shared, const TileArgs& args) {
  using Shape = TileShape<D>;
  constexpr int N = Shape::KEYS / 8;
  int span = args.tiles[2 * blockIdx.x], first_query = args.tiles[2 * blockIdx.x + 1];
  int head = blockIdx.y, kv_head = head / (args.q_heads / args.kv_heads);
  int queries = args.lens[span], position = args.positions[span];
  if (first_query >= queries) return;
  int lane = lane_id(), pair = (lane & 3) * 2, warp_query = first_query + warp_id() * 16;

  QueryRow rows[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int query = warp_query + (lane >> 2) + half * 8, at = position + query;
    rows[half] = QueryRow{query, at, args.window > 0 ? at - args.window : -1, -INFINITY, 0.f};
  }

  size_t page = (size_t)PREFILL_PAGE * D;
  KeyTiles<D> tiles{shared,
                    shared + 2 * Shape::TILE,
                    args.cache + kv_head * page,
                    args.kv_heads * page,
                    args.tables + args.table_starts[span],
                    args.window > 0 ? max(0, position + first_query + 1 - args.window) : 0,
                    position + min(queries, first_query + PREFILL_QUERIES) - 1};
  int first_tile = tiles.first_key / Shape::KEYS, last_tile = tiles.last_key / Shape::KEYS;
  tiles.copy(first_tile, tiles.blocks_of(first_tile));
  auto ahead = tiles.blocks_of(min(first_tile + 1, last_tile));

  unsigned q[D / 16][4];
  load_queries<D>(q, args, span, rows, pair);
  float out[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; i++) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.f;
  float scale = args.scale * PREFILL_LOG2E, slope = args.slopes ? args.slopes[head] * PREFILL_LOG2E : 0.f;

  auto attend = [&](int tile) {
    int first_key = tile * Shape::KEYS, warp_position = position + warp_query;
    float scores[N][4];
    multiply_keys<D>(scores, q, tiles.keys_of(tile), lane);
    if (args.slopes)
      scale_scores<N>(scores, scale, slope, rows, first_key + pair);
    else
      scale_scores<N>(scores, scale);
    bool some_after = first_key + Shape::KEYS - 1 > warp_position;
    bool some_behind = args.window > 0 && first_key <= warp_position + 15 - args.window;
    if (some_after || some_behind) mask_scores<N>(scores, rows, first_key + pair);
    float factor[2] = {advance<N>(rows[0], scores, 0), advance<N>(rows[1], scores, 2)};
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) out[i][e] *= factor[e / 2];
    multiply_values<D>(out, scores, tiles.values_of(tile), lane);
  };

  for (int tile = first_tile; tile <= last_tile; tile++) {
    if (tile < last_tile) {
      tiles.copy(tile + 1, ahead);
      ahead = tiles.blocks_of(min(tile + 2, last_tile));
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    // A warp without a query only copies.
    if (warp_query < queries) attend(tile);
    // All have read this buffer before the copies of the tile after the next write to it.
    __syncthreads();
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    float inverse = 1.f / row_sum(rows[half].sum);
    if (rows[half].query >= queries) continue;
    bf16* to = args.out + ((size_t)(args.rows[span] + rows[half].query) * args.q_heads + head) * D + pair;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      // Plus zero: a zero's sign must not tell how many tiles a row went through.
      float low = __fmaf_rn(out[i][2 * half], inverse, 0.f),
            high = __fmaf_rn(out[i][2 * half + 1], inverse, 0.f);
      *reinterpret_cast<unsigned*>(to + i * 8) = pack2(low, high);
    }
  }
}

// lint: narrow <= 0
KERNEL(128, attend_tile_d16,
       (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows,
        const int* positions, const int* lens, const int* tables, const int* table_starts,
        const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<16>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts,
                                   slopes, q_heads, kv_heads, window, scale});
}

// lint: narrow <= 0
KERNEL(128, attend_tile_d32,
       (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows,
        const int* positions, const int* lens, const int* tables, const int* table_starts,
        const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<32>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts,
                                   slopes, q_heads, kv_heads, window, scale});
}

// lint: narrow <= 0
KERNEL(128, attend_tile_d64,
       (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows,
        const int* positions, const int* lens, const int* tables, const int* table_starts,
        const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<64>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts,
                                   slopes, q_heads, kv_heads, window, scale});
}

// lint: narrow <= 0
KERNEL(128, attend_tile_d80,
       (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows,
        const int* positions, const int* lens, const int* tables, const int* table_starts,
        const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<80>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts,
                                   slopes, q_heads, kv_heads, window, scale});
}

// lint: narrow <= 0
KERNEL(128, attend_tile_d96,
       (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows,
        const int* positions, const int* lens, const int* tables, const int* table_starts,
        const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<96>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts,
                                   slopes, q_heads, kv_heads, window, scale});
}

// lint: narrow <= 0
KERNEL(128, attend_tile_d112,
       (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows,
        const int* positions, const int* lens, const int* tables, const int* table_starts,
        const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<112>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts,
                                    slopes, q_heads, kv_heads, window, scale});
}

// lint: narrow <= 0
KERNEL(128, attend_tile_d128,
       (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows,
        const int* positions, const int* lens, const int* tables, const int* table_starts,
        const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<128>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts,
                                    slopes, q_heads, kv_heads, window, scale});
}

// lint: narrow <= 0
KERNEL(128, attend_tile_d256,
       (bf16* out, const float* qkv, const bf16* kv_layer, const int* tiles, const int* rows,
        const int* positions, const int* lens, const int* tables, const int* table_starts,
        const float* slopes, int q_heads, int kv_heads, int window, float scale)) {
  DYNAMIC_SHARED(bf16, shared);
  attend_tile<256>(shared, TileArgs{out, qkv, kv_layer, tiles, rows, positions, lens, tables, table_starts,
                                    slopes, q_heads, kv_heads, window, scale});
}
