// Rotary embedding of q and k, and the way of k and v into the cache, in one pass over the fused rows.
//
// A warp owns one head of one row; eight heads a block. The whole is a few kilobytes a row, so what counts is
// latency: many small blocks and 16-byte accesses. Forerunner: one warp a head, 2.2 us for one token of 32 +
// 2 * 32 heads of 128 on an H100, against 8.5 us with a block for all heads. This kernel itself has not run
// on hardware.
#include "device.cuh"

constexpr int BLOCK_TOKENS = 16;

// The two halves of four pairs: h[i], h[i + d/2] = h[i] c - h[i + d/2] s, h[i + d/2] c + h[i] s.
__device__ __forceinline__ void rotate(float& low, float& high, float c, float s) {
  const float turned = low * c - high * s;
  high = high * c + low * s;
  low = turned;
}

// For each row r with slots[r] >= 0 (a padding row has -1: nothing of it is read or written):
// q and k are rotated in place by cos_sin[r] (d/2 cosines, then d/2 sines), half-split form; without cos_sin
// they stay. Then k and v go to the cache, rounded to bf16. slots[r] = block * 16 + place in the block. qkv
// [rows, (q_heads + 2 kv_heads) * d], d even; kv_layer [block][K, V][kv_heads][16][d], the base of one layer.
// Grid: (rows, ceil((q_heads + 2 kv_heads) / 8)).
// lint: wide >= 4, narrow <= 0
KERNEL(256, rope_write_kv,
       (float* qkv, bf16* kv_layer, const float* cos_sin, const int* slots, int q_heads, int kv_heads,
        int d)) {
  const int row = blockIdx.x, head = blockIdx.y * (blockDim.x >> 5) + warp_id(),
            heads = q_heads + 2 * kv_heads;
  const int slot = slots[row], half = d / 2;
  if (slot < 0 || head >= heads) return;
  const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads, turns = cos_sin && !is_v;
  if (is_q && !turns) return;

  float* x = qkv + (static_cast<size_t>(row) * heads + head) * d;
  const float* cosines = cos_sin + static_cast<size_t>(row) * d;
  const float* sines = cosines + half;
  const int kv_head = head - q_heads - (is_v ? kv_heads : 0);
  const size_t page = (static_cast<size_t>(slot / BLOCK_TOKENS) * 2 + is_v) * kv_heads + kv_head;
  bf16* place = is_q ? nullptr : kv_layer + (page * BLOCK_TOKENS + slot % BLOCK_TOKENS) * d;

  if (half % 4 == 0) {
    for (int at = 4 * lane_id(); at < half; at += 4 * 32) {
      float4 low = load4(x + at), high = load4(x + half + at);
      if (turns) {
        const float4 c = load4(cosines + at), s = load4(sines + at);
        rotate(low.x, high.x, c.x, s.x), rotate(low.y, high.y, c.y, s.y);
        rotate(low.z, high.z, c.z, s.z), rotate(low.w, high.w, c.w, s.w);
        store4(x + at, low), store4(x + half + at, high);
      }
      if (place) store4(place + at, low), store4(place + half + at, high);
    }
  } else {
#pragma unroll 1
    for (int at = lane_id(); at < half; at += 32) {
      float low = x[at], high = x[half + at];
      if (turns) {
        rotate(low, high, cosines[at], sines[at]);
        x[at] = low, x[half + at] = high;
      }
      if (place) place[at] = __float2bfloat16(low), place[half + at] = __float2bfloat16(high);
    }
  }
}
