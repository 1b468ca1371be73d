// bfloat16 as <cuda_bf16.h> has it: the upper half of an f32, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? 0x7fff : uint16_t((word + 0x7fffu + (word >> 16 & 1)) >> 16);
  }
  operator float() const {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) : x(low), y(high) {}
};

inline float __bfloat162float(__nv_bfloat16 value) { return float(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rz(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  __nv_bfloat16 result;
  result.bits = value != value ? 0x7fff : uint16_t(word >> 16);
  return result;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 value;
  value.bits = bits;
  return value;
}
inline __nv_bfloat16 __int2bfloat16_rn(int value) { return __nv_bfloat16(float(value)); }

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__nv_bfloat16(low), __nv_bfloat16(high)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 pair) { return __floats2bfloat162_rn(pair.x, pair.y); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) { return {low, high}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 both) { return {both, both}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) { return {low, high}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {float(pair.x), float(pair.y)}; }
inline float __low2float(__nv_bfloat162 pair) { return float(pair.x); }
inline float __high2float(__nv_bfloat162 pair) { return float(pair.y); }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 pair) { return pair.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 pair) { return pair.y; }

// Arithmetic rounds once, as the device's instructions do: f32 holds every product of two bf16 exactly.
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(float(a.x) * float(b.x), float(a.y) * float(b.y));
}
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(float(a.x) + float(b.x), float(a.y) + float(b.y));
}
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __floats2bfloat162_rn(float(a.x) - float(b.x), float(a.y) - float(b.y));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__nv_bfloat16(float(double(float(a.x)) * float(b.x) + float(c.x))),
          __nv_bfloat16(float(double(float(a.y)) * float(b.y) + float(c.y)))};
}
