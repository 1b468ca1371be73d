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

// The unfinished softmax of one query head over the keys of one lane group: its 8 columns of the weighted sum
// of values, the largest score, the sum of weights.
struct Softmax {
  float values[8];
  float largest;
  float sum;
};

// A lane's place, and the keys that the query sees.
template <int D>
struct Lane {
  // The lane's key within a load, and its 16-byte chunk of that key.
  int of_key;
  int chunk;
  int first_key;
  int length;

  __device__ __forceinline__ bool has_chunk() const { return chunk < SplitShape<D>::CHUNKS; }
  __device__ __forceinline__ int key_of(int load) const { return load * SplitShape<D>::KEYS + of_key; }
  __device__ __forceinline__ bool visible(int key) const {
    return (unsigned)(key - first_key) < (unsigned)(length - first_key);
  }
  // 16 bytes of a key of the page, or zeros where it is not to be seen.
  __device__ __forceinline__ uint4 load(const bf16* page, int page_key, int load) const {
    int token = key_of(load);
    uint4 chunk_of_key = make_uint4(0, 0, 0, 0);
    if (has_chunk() && visible(page_key + token))
      chunk_of_key = __ldg(reinterpret_cast<const uint4*>(page + token * D + chunk * 8));
    return chunk_of_key;
  }
};

// A head's query, multiplied by `scale`: the lane's 8 numbers.
template <int D>
__device__ __forceinline__ void load_query(float (&query)[8], const float* from, const Lane<D>& lane,
                                           float scale) {
  float4 low = make_float4(0.f, 0.f, 0.f, 0.f), high = low;
  if (lane.has_chunk()) {
    low = __ldg(reinterpret_cast<const float4*>(from + lane.chunk * 8));
    high = __ldg(reinterpret_cast<const float4*>(from + lane.chunk * 8 + 4));
  }
  float numbers[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int e = 0; e < 8; e++) query[e] = numbers[e] * scale;
}

// The product of a key and a query, in all lanes of the key.
template <int LANES>
__device__ __forceinline__ float dot(const float (&query)[8], const float (&key)[8]) {
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < 8; e++) sum += query[e] * key[e];
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(WARP_ALL, sum, distance);
  return sum;
}

// Scores become weights; what was summed before is brought to the new maximum.
template <int LOADS>
__device__ __forceinline__ void advance(Softmax& softmax, float (&scores)[LOADS]) {
  float before = softmax.largest;
#pragma unroll
  for (int i = 0; i < LOADS; i++) softmax.largest = fmaxf(softmax.largest, scores[i]);
  // Nothing seen yet: infinity minus infinity is not a number.
  float base = softmax.largest == -INFINITY ? 0.f : softmax.largest;
  float factor = exp2f(before - base);
  softmax.sum *= factor;
#pragma unroll
  for (int e = 0; e < 8; e++) softmax.values[e] *= factor;
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    scores[i] = exp2f(scores[i] - base);
    softmax.sum += scores[i];
  }
}

// Puts the block's softmaxes together (of its warps, and of the keys side by side in a warp) and writes the
// split's.
template <int D, int HEADS>
__device__ __forceinline__ void merge_softmaxes(float* merge, const Softmax (&softmax)[HEADS],
                                                const Lane<D>& lane, const SplitArgs& args, int first_head,
                                                int heads) {
  using Shape = SplitShape<D>;
  auto part_of = [&](int part, int h) { return merge + (part * HEADS + h) * (D + 2); };
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float* to = part_of(warp_id() * Shape::KEYS + lane.of_key, h);
    const float(&values)[8] = softmax[h].values;
    if (lane.has_chunk()) {
#pragma unroll
      for (int e = 0; e < 8; e += 2)
        *reinterpret_cast<float2*>(to + lane.chunk * 8 + e) = make_float2(values[e], values[e + 1]);
    }
    if (lane.chunk == 0) *reinterpret_cast<float2*>(to + D) = make_float2(softmax[h].largest, softmax[h].sum);
  }
  __syncthreads();
  for (int at = threadIdx.x; at < heads * D; at += DECODE_WARPS * 32) {
    int h = at / D, column = at % D;
    float largest = -INFINITY, sum = 0.f, values = 0.f;
    for (int part = 0; part < Shape::PARTS; part++) largest = fmaxf(largest, part_of(part, h)[D]);
#pragma unroll 4
    for (int part = 0; part < Shape::PARTS; part++) {
      const float* from = part_of(part, h);
      float factor = from[D] == -INFINITY ? 0.f : exp2f(from[D] - largest);
      sum += factor * from[D + 1];
      values += factor * from[column];
    }
    size_t row = (size_t)blockIdx.x * args.q_heads + first_head + h;
    float* to = args.partial + (row * args.splits + blockIdx.z) * (D + 2);
    to[column] = values;
    if (column == 0) {
      to[D] = largest;
      to[D + 1] = sum;
    }
  }
}

// HEADS query heads from `first_head` on, of which `heads` exist; a head past them repeats the last.
template <int D, int HEADS>
__device__ __forceinline__ void attend_heads(float* merge, const SplitArgs& args, int kv_head, int first_head,
                                             int heads) {
  using Shape = SplitShape<D>;
  constexpr int LOADS = loads_at_once(Shape::LOADS_PAGE, HEADS);
  int span = blockIdx.x, length = args.lens[span];
  int first_key = args.window > 0 ? max(0, length - args.window) : 0;
  Lane<D> lane{lane_id() / Shape::LANES, lane_id() % Shape::LANES, first_key, length};

  // The split's part of the visible pages.
  int first_page = first_key / DECODE_PAGE, pages_end = (length + DECODE_PAGE - 1) / DECODE_PAGE;
  int pages_split = (pages_end - first_page + args.splits - 1) / args.splits;
  int begin = first_page + (int)blockIdx.z * pages_split, end = min(pages_end, begin + pages_split);

  float query[HEADS][8], slope[HEADS];
  Softmax softmax[HEADS];
  const float* row = args.qkv + (size_t)args.rows[span] * (args.q_heads + 2 * args.kv_heads) * D;
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    int head = first_head + min(h, heads - 1);
    load_query<D>(query[h], row + (size_t)head * D, lane, args.scale * DECODE_LOG2E);
    slope[h] = args.slopes ? args.slopes[head] * DECODE_LOG2E : 0.f;
    softmax[h] = Softmax{{}, -INFINITY, 0.f};
  }

  const int* table = args.tables + args.table_starts[span];
  size_t side = (size_t)args.kv_heads * DECODE_PAGE * D;
  const bf16* cache = args.cache + (size_t)kv_head * DECODE_PAGE * D;
  // The id of the next page's block is read a page ahead.
  int page = begin + warp_id();
  int block = page < end ? __ldg(table + page) : 0;
#pragma unroll 1
  for (; page < end; page += DECODE_WARPS) {
    const bf16* keys = cache + (size_t)block * 2 * side;
    int page_key = page * DECODE_PAGE;
    block = page + DECODE_WARPS < end ? __ldg(table + page + DECODE_WARPS) : 0;
#pragma unroll 1
    for (int first = 0; first < Shape::LOADS_PAGE; first += LOADS) {
      uint4 k[LOADS], v[LOADS];
#pragma unroll
      for (int i = 0; i < LOADS; i++) k[i] = lane.load(keys, page_key, first + i);
#pragma unroll
      for (int i = 0; i < LOADS; i++) v[i] = lane.load(keys + side, page_key, first + i);

      float scores[HEADS][LOADS];
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        float numbers[8];
        unpack8(k[i], numbers);
        int key = page_key + lane.key_of(first + i);
        float distance = (float)(key + 1 - length);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          float score = dot<Shape::LANES>(query[h], numbers);
          scores[h][i] = lane.visible(key) ? score + slope[h] * distance : -INFINITY;
        }
      }
#pragma unroll
      for (int h = 0; h < HEADS; h++) advance(softmax[h], scores[h]);
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        float numbers[8];
        unpack8(v[i], numbers);
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
          for (int e = 0; e < 8; e++) softmax[h].values[e] += scores[h][i] * numbers[e];
      }
    }
  }
  merge_softmaxes<D, HEADS>(merge, softmax, lane, args, first_head, heads);
}

template <int D>
__device__ __forceinline__ void attend_split(float* merge, const SplitArgs& args) {
  int group = args.q_heads / args.kv_heads, blocks_group = (group + DECODE_HEADS - 1) / DECODE_HEADS;
  int kv_head = blockIdx.y / blocks_group, first = blockIdx.y % blocks_group * DECODE_HEADS;
  int heads = min(DECODE_HEADS, group - first), first_head = kv_head * group + first;
  if (heads == 1)
    attend_heads<D, 1>(merge, args, kv_head, first_head, heads);
  else if (heads == 2)
    attend_heads<D, 2>(merge, args, kv_head, first_head, heads);
  else
    attend_heads<D, DECODE_HEADS>(merge, args, kv_head, first_head, heads);
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
