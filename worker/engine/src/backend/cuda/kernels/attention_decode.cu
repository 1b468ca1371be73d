// Attention of one query of each sequence over its paged cache, split over the keys.
//
// Computes the formula of attention_prefill.cu for spans of one row: span s is row rows[s] of qkv, at
// position lens[s] - 1 of a sequence of lens[s] tokens in the cache. A span of length 0 is padding and gives
// zeros.
//
// attend_split_d{d}: grid (spans, kv_heads * ceil(group / 4), splits) with group = q_heads / kv_heads, 128
// threads. Split z takes the z-th part of the pages that the query sees, whole pages, parts of one size but
// the last; the parts follow from the length, the window and the number of splits alone. Each leaves an
// unfinished softmax in partial [span][q_head][split][d + 2]: the weighted sum of values [d], the largest
// score in units of log2, the sum of weights. attend_combine: grid (spans, q_heads), d / 2 threads rounded up
// to warps; puts the parts together into out [rows][q_heads * d] (bf16).
//
// The form is split-KV decoding (Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023), so that a few long
// sequences fill the card. A warp takes a page at a time. A key's d numbers lie on as many lanes as it has
// 16-byte chunks (rounded up to a power of two), so that each load of a warp covers whole keys; up to 8 loads
// of K and of V are under way at once. Up to 4 query heads of a KV head share each load: a group of 8 reads a
// page twice, the second time from the L2. Keys past the length or behind the window are not read: their
// scores are minus infinity and their values zero.
//
// The forerunner (d 128 alone, another layout of the cache) reached 96 % of an H100's read bandwidth and took
// 98 us for one sequence of 16384 tokens with 32 heads. This kernel has not run on hardware.
#include "device.cuh"

constexpr int DECODE_WARPS = 4;
constexpr int DECODE_PAGE = 16;
// Query heads that share the loads of one block.
constexpr int DECODE_HEADS = 4;
constexpr float DECODE_LOG2E = 1.44269504f;

__device__ constexpr int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <int D>
struct SplitShape {
  static constexpr int CHUNKS = D / 8;
  // Lanes of a key; where d is no power of two the last ones hold zeros.
  static constexpr int LANES = power_of_two_from(CHUNKS);
  // Keys of one load of a warp.
  static constexpr int KEYS = 32 / LANES;
  static constexpr int LOADS_PAGE = DECODE_PAGE / KEYS;
  // Partial softmaxes of a block before they are merged.
  static constexpr int PARTS = DECODE_WARPS * KEYS;
  static constexpr int MERGE = PARTS * DECODE_HEADS * (D + 2);
};

// Loads of K, and of V, under way at once: fewer for many heads, whose sums take the registers. Three blocks
// are to fit on a multiprocessor (at most 168 registers a thread).
__device__ constexpr int loads_at_once(int loads_page, int heads) {
  int most = heads > 2 ? 4 : 8;
  return loads_page < most ? loads_page : most;
}

struct SplitArgs {
  float* partial;
  const float* qkv;
  const bf16* cache;
  const int* rows;
  const int* lens;
  const int* tables;
  const int* table_starts;
  const float* slopes;
  int q_heads;
  int kv_heads;
  int window;
  float scale;
  int splits;
};

// HEADS query heads from `first_head` on, of which `heads` exist.
template <int D, int HEADS>
__device__ __forceinline__ void attend_split_heads(float* merge, const SplitArgs& args, int kv_head,
                                                   int first_head, int heads) {
  using Shape = SplitShape<D>;
  constexpr int LANES = Shape::LANES, KEYS = Shape::KEYS, LOADS = loads_at_once(Shape::LOADS_PAGE, HEADS);
  int span = blockIdx.x, split = blockIdx.z;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // The lane's key within a load, and its chunk of that key.
  int of_key = lane / LANES, chunk = lane % LANES;
  bool has_chunk = chunk < Shape::CHUNKS;

  int length = args.lens[span];
  int first_key = args.window > 0 ? max(0, length - args.window) : 0;
  int first_page = first_key / DECODE_PAGE, pages_end = (length + DECODE_PAGE - 1) / DECODE_PAGE;
  int pages_split = (pages_end - first_page + args.splits - 1) / args.splits;
  int begin = first_page + split * pages_split, end = min(pages_end, begin + pages_split);

  float query[HEADS][8], sum_values[HEADS][8], largest[HEADS], sum[HEADS], slope[HEADS];
  const float* row = args.qkv + (size_t)args.rows[span] * (args.q_heads + 2 * args.kv_heads) * D;
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    int head = first_head + min(h, heads - 1);
    float4 low = make_float4(0.f, 0.f, 0.f, 0.f), high = low;
    if (has_chunk) {
      const float4* from = reinterpret_cast<const float4*>(row + (size_t)head * D + chunk * 8);
      low = __ldg(from);
      high = __ldg(from + 1);
    }
    float numbers[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int e = 0; e < 8; e++) {
      query[h][e] = numbers[e] * (args.scale * DECODE_LOG2E);
      sum_values[h][e] = 0.f;
    }
    largest[h] = -INFINITY;
    sum[h] = 0.f;
    slope[h] = args.slopes ? args.slopes[head] * DECODE_LOG2E : 0.f;
  }

  const int* table = args.tables + args.table_starts[span];
  size_t side = (size_t)args.kv_heads * DECODE_PAGE * D;
  // The id of the next page's block is read a page ahead.
  int page = begin + warp;
  int block = page < end ? __ldg(table + page) : 0;
#pragma unroll 1
  for (; page < end; page += DECODE_WARPS) {
    const bf16* page_keys =
        args.cache + (size_t)block * 2 * side + (size_t)kv_head * DECODE_PAGE * D + chunk * 8;
    block = page + DECODE_WARPS < end ? __ldg(table + page + DECODE_WARPS) : 0;
#pragma unroll 1
    for (int part = 0; part < Shape::LOADS_PAGE; part += LOADS) {
      uint4 k[LOADS], v[LOADS];
      auto key_of = [&](int i) { return page * DECODE_PAGE + (part + i) * KEYS + of_key; };
      auto visible = [&](int key) { return (unsigned)(key - first_key) < (unsigned)(length - first_key); };
      auto load = [&](const bf16* from, int i) {
        bool wanted = has_chunk && visible(key_of(i));
        const bf16* at = from + ((part + i) * KEYS + of_key) * D;
        return wanted ? __ldg(reinterpret_cast<const uint4*>(at)) : make_uint4(0, 0, 0, 0);
      };
#pragma unroll
      for (int i = 0; i < LOADS; i++) k[i] = load(page_keys, i);
#pragma unroll
      for (int i = 0; i < LOADS; i++) v[i] = load(page_keys + side, i);

      float scores[HEADS][LOADS];
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        float numbers[8];
        unpack8(k[i], numbers);
        int key = key_of(i);
        float distance = (float)(key + 1 - length);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          float dot = 0.f;
#pragma unroll
          for (int e = 0; e < 8; e++) dot += query[h][e] * numbers[e];
#pragma unroll
          for (int o = LANES / 2; o > 0; o /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, o);
          scores[h][i] = visible(key) ? dot + slope[h] * distance : -INFINITY;
        }
      }
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        float before = largest[h];
#pragma unroll
        for (int i = 0; i < LOADS; i++) largest[h] = fmaxf(largest[h], scores[h][i]);
        // Nothing seen yet: infinity minus infinity is not a number.
        float base = largest[h] == -INFINITY ? 0.f : largest[h];
        float factor = exp2f(before - base);
        sum[h] *= factor;
#pragma unroll
        for (int e = 0; e < 8; e++) sum_values[h][e] *= factor;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
          scores[h][i] = exp2f(scores[h][i] - base);
          sum[h] += scores[h][i];
        }
      }
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        float numbers[8];
        unpack8(v[i], numbers);
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
          for (int e = 0; e < 8; e++) sum_values[h][e] += scores[h][i] * numbers[e];
      }
    }
  }

  // Merge the softmaxes of the block's warps and of the keys side by side in a warp.
  auto part_of = [&](int part, int h) { return merge + (part * HEADS + h) * (D + 2); };
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float* to = part_of(warp * KEYS + of_key, h);
    if (has_chunk) {
#pragma unroll
      for (int e = 0; e < 8; e += 2)
        *reinterpret_cast<float2*>(to + chunk * 8 + e) = make_float2(sum_values[h][e], sum_values[h][e + 1]);
    }
    if (chunk == 0) *reinterpret_cast<float2*>(to + D) = make_float2(largest[h], sum[h]);
  }
  __syncthreads();
  for (int at = threadIdx.x; at < heads * D; at += DECODE_WARPS * 32) {
    int h = at / D, column = at % D;
    float most = -INFINITY, weights = 0.f, values = 0.f;
    for (int part = 0; part < Shape::PARTS; part++) most = fmaxf(most, part_of(part, h)[D]);
#pragma unroll 4
    for (int part = 0; part < Shape::PARTS; part++) {
      const float* from = part_of(part, h);
      float factor = from[D] == -INFINITY ? 0.f : exp2f(from[D] - most);
      weights += factor * from[D + 1];
      values += factor * from[column];
    }
    float* to =
        args.partial + (((size_t)span * args.q_heads + first_head + h) * args.splits + split) * (D + 2);
    to[column] = values;
    if (column == 0) {
      to[D] = most;
      to[D + 1] = weights;
    }
  }
}

template <int D>
__device__ __forceinline__ void attend_split(float* merge, const SplitArgs& args) {
  int group = args.q_heads / args.kv_heads, blocks_group = (group + DECODE_HEADS - 1) / DECODE_HEADS;
  int kv_head = blockIdx.y / blocks_group, first = blockIdx.y % blocks_group * DECODE_HEADS;
  int heads = min(DECODE_HEADS, group - first), first_head = kv_head * group + first;
  if (heads == 1)
    attend_split_heads<D, 1>(merge, args, kv_head, first_head, heads);
  else if (heads == 2)
    attend_split_heads<D, 2>(merge, args, kv_head, first_head, heads);
  else
    attend_split_heads<D, DECODE_HEADS>(merge, args, kv_head, first_head, heads);
}

// lint: narrow <= 0
KERNEL(128, attend_combine,
       (bf16* out, const float* partial, const int* rows, int q_heads, int d, int splits)) {
  int span = blockIdx.x, head = blockIdx.y;
  const float* parts = partial + ((size_t)span * q_heads + head) * splits * (d + 2);
  bf16* row = out + ((size_t)rows[span] * q_heads + head) * d;
  float most = -INFINITY;
  for (int split = 0; split < splits; split++) most = fmaxf(most, parts[split * (d + 2) + d]);
  for (int column = 2 * threadIdx.x; column < d; column += 2 * blockDim.x) {
    float weights = 0.f, low = 0.f, high = 0.f;
    for (int split = 0; split < splits; split++) {
      const float* part = parts + split * (d + 2);
      float2 state = __ldg(reinterpret_cast<const float2*>(part + d));
      float2 values = __ldg(reinterpret_cast<const float2*>(part + column));
      float factor = state.x == -INFINITY ? 0.f : exp2f(state.x - most);
      weights += factor * state.y;
      low += factor * values.x;
      high += factor * values.y;
    }
    // A span without keys is padding.
    float inverse = most == -INFINITY ? 0.f : 1.f / weights;
    *reinterpret_cast<unsigned*>(row + column) = pack2(low * inverse, high * inverse);
  }
}

// lint: wide >= 8, narrow <= 0, registers <= 168
KERNEL(128, attend_split_d16,
       (float* partial, const float* qkv, const bf16* kv_layer, const int* rows, const int* lens,
        const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads,
        int window, float scale, int splits)) {
  __shared__ float merge[SplitShape<16>::MERGE];
  attend_split<16>(merge, SplitArgs{partial, qkv, kv_layer, rows, lens, tables, table_starts, slopes, q_heads,
                                    kv_heads, window, scale, splits});
}

// lint: wide >= 8, narrow <= 0, registers <= 168
KERNEL(128, attend_split_d32,
       (float* partial, const float* qkv, const bf16* kv_layer, const int* rows, const int* lens,
        const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads,
        int window, float scale, int splits)) {
  __shared__ float merge[SplitShape<32>::MERGE];
  attend_split<32>(merge, SplitArgs{partial, qkv, kv_layer, rows, lens, tables, table_starts, slopes, q_heads,
                                    kv_heads, window, scale, splits});
}

// lint: wide >= 8, narrow <= 0, registers <= 168
KERNEL(128, attend_split_d64,
       (float* partial, const float* qkv, const bf16* kv_layer, const int* rows, const int* lens,
        const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads,
        int window, float scale, int splits)) {
  __shared__ float merge[SplitShape<64>::MERGE];
  attend_split<64>(merge, SplitArgs{partial, qkv, kv_layer, rows, lens, tables, table_starts, slopes, q_heads,
                                    kv_heads, window, scale, splits});
}

// lint: wide >= 8, narrow <= 0, registers <= 168
KERNEL(128, attend_split_d80,
       (float* partial, const float* qkv, const bf16* kv_layer, const int* rows, const int* lens,
        const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads,
        int window, float scale, int splits)) {
  __shared__ float merge[SplitShape<80>::MERGE];
  attend_split<80>(merge, SplitArgs{partial, qkv, kv_layer, rows, lens, tables, table_starts, slopes, q_heads,
                                    kv_heads, window, scale, splits});
}

// lint: wide >= 8, narrow <= 0, registers <= 168
KERNEL(128, attend_split_d96,
       (float* partial, const float* qkv, const bf16* kv_layer, const int* rows, const int* lens,
        const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads,
        int window, float scale, int splits)) {
  __shared__ float merge[SplitShape<96>::MERGE];
  attend_split<96>(merge, SplitArgs{partial, qkv, kv_layer, rows, lens, tables, table_starts, slopes, q_heads,
                                    kv_heads, window, scale, splits});
}

// lint: wide >= 8, narrow <= 0, registers <= 168
KERNEL(128, attend_split_d112,
       (float* partial, const float* qkv, const bf16* kv_layer, const int* rows, const int* lens,
        const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads,
        int window, float scale, int splits)) {
  __shared__ float merge[SplitShape<112>::MERGE];
  attend_split<112>(merge, SplitArgs{partial, qkv, kv_layer, rows, lens, tables, table_starts, slopes,
                                     q_heads, kv_heads, window, scale, splits});
}

// lint: wide >= 8, narrow <= 0, registers <= 168
KERNEL(128, attend_split_d128,
       (float* partial, const float* qkv, const bf16* kv_layer, const int* rows, const int* lens,
        const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads,
        int window, float scale, int splits)) {
  __shared__ float merge[SplitShape<128>::MERGE];
  attend_split<128>(merge, SplitArgs{partial, qkv, kv_layer, rows, lens, tables, table_starts, slopes,
                                     q_heads, kv_heads, window, scale, splits});
}

// lint: wide >= 8, narrow <= 0, registers <= 168
KERNEL(128, attend_split_d256,
       (float* partial, const float* qkv, const bf16* kv_layer, const int* rows, const int* lens,
        const int* tables, const int* table_starts, const float* slopes, int q_heads, int kv_heads,
        int window, float scale, int splits)) {
  __shared__ float merge[SplitShape<256>::MERGE];
  attend_split<256>(merge, SplitArgs{partial, qkv, kv_layer, rows, lens, tables, table_starts, slopes,
                                     q_heads, kv_heads, window, scale, splits});
}
