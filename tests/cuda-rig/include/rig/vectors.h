// CUDA's small vector types, with CUDA's alignment: a misaligned access is caught, as the device would refuse
// it.
#pragma once

#define RIG_VECTOR2(T, NAME, ALIGN) \
  struct alignas(ALIGN) NAME {      \
    T x, y;                         \
  };                                \
  inline NAME make_##NAME(T x, T y) { return {x, y}; }
#define RIG_VECTOR3(T, NAME) \
  struct NAME {              \
    T x, y, z;               \
  };                         \
  inline NAME make_##NAME(T x, T y, T z) { return {x, y, z}; }
#define RIG_VECTOR4(T, NAME, ALIGN) \
  struct alignas(ALIGN) NAME {      \
    T x, y, z, w;                   \
  };                                \
  inline NAME make_##NAME(T x, T y, T z, T w) { return {x, y, z, w}; }

RIG_VECTOR2(signed char, char2, 2)
RIG_VECTOR4(signed char, char4, 4)
RIG_VECTOR2(unsigned char, uchar2, 2)
RIG_VECTOR4(unsigned char, uchar4, 4)
RIG_VECTOR2(short, short2, 4)
RIG_VECTOR4(short, short4, 8)
RIG_VECTOR2(unsigned short, ushort2, 4)
RIG_VECTOR4(unsigned short, ushort4, 8)
RIG_VECTOR2(int, int2, 8)
RIG_VECTOR3(int, int3)
RIG_VECTOR4(int, int4, 16)
RIG_VECTOR2(unsigned, uint2, 8)
RIG_VECTOR3(unsigned, uint3)
RIG_VECTOR4(unsigned, uint4, 16)
RIG_VECTOR2(float, float2, 8)
RIG_VECTOR3(float, float3)
RIG_VECTOR4(float, float4, 16)
RIG_VECTOR2(double, double2, 16)
RIG_VECTOR2(long long, longlong2, 16)
RIG_VECTOR2(unsigned long long, ulonglong2, 16)

#undef RIG_VECTOR2
#undef RIG_VECTOR3
#undef RIG_VECTOR4
