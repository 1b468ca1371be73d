// What all kernels share: the entry macro, the types that cross the launch, vector loads and stores,
// reductions. Owns no kernel. Tensor-core and async-copy instructions are in mma.cuh.
//
// One source, two compilers: NVRTC for a GPU, g++ for the test rig, which runs a block's threads on a CPU
// (TANDEM_RIG). An entry is written `KERNEL(threads_max, name, (parameters)) { ... }`; the build reads names
// and parameters from it.
//
// Contract of all entries: base pointers are 16-byte aligned, rows lie one after the other, blocks have whole
// warps. Offsets into a buffer are 64-bit: a batch's rows times a vocabulary exceed 2^31.
//
// A comment `// lint: wide >= A, narrow <= B` before an entry is checked in the PTX when cubins are built: at
// least A 16-byte loads from global memory, at most B loads of under 4 bytes. Loads that fall apart into
// bytes cost up to ten times the time (measured), and nothing else shows that without a GPU.
#pragma once

#ifdef TANDEM_RIG
#include "cuda_shim.h"
#else
#ifdef BLOCKS_MIN  // a file may say how many blocks a multiprocessor is to hold, where the assembler guesses
                   // wrong
#define KERNEL(threads_max, name, parameters) \
  extern "C" __global__ void __launch_bounds__(threads_max, BLOCKS_MIN) name parameters
#else
#define KERNEL(threads_max, name, parameters) \
  extern "C" __global__ void __launch_bounds__(threads_max) name parameters
#endif
#define DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared)
#define INFINITY __int_as_float(0x7f800000)

// What the kernels need of <cuda_bf16.h>, so that a bare NVRTC without the toolkit's headers compiles them.
// Conversions to bf16 round to nearest, ties to even.
struct __align__(2) __nv_bfloat16 {
  unsigned short bits;
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
__device__ __forceinline__ __nv_bfloat16 __float2bfloat16(float v) {
  __nv_bfloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(v));
  return rounded;
}
__device__ __forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  __nv_bfloat162 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(reinterpret_cast<unsigned&>(pair)) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}
#endif

typedef __nv_bfloat16 bf16;

// How one row is to be sampled; laid out as the host's struct of the same name.
struct Draw {
  int row;            // of the logits
  float temperature;  // 0: the largest logit
  int top_k;          // 0: no limit
  float top_p;        // 1 and above: no limit
  float min_p;        // 0 and below: no limit
  double u;           // in [0, 1), drawn by the host
};
static_assert(sizeof(Draw) == 32, "the host's struct has 32 bytes");

constexpr unsigned WARP_ALL = 0xffffffffu;

// Lane in the warp and warp in the block, of one-dimensional blocks.
__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

// Numbers 4 * i .. 4 * i + 3 of this thread, of all threads of a one-dimensional grid: where a loop over n
// begins.
__device__ __forceinline__ long long first_of_four() {
  return 4 * (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x);
}
__device__ __forceinline__ long long stride_of_four() {
  return 4 * (static_cast<long long>(gridDim.x) * blockDim.x);
}

// Vectors of four.

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }

// Two numbers rounded to bf16 (to nearest, ties to even), the first in the low half.
__device__ __forceinline__ unsigned pack2(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<unsigned*>(&pair);
}

__device__ __forceinline__ void store4(bf16* p, float4 v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(pack2(v.x, v.y), pack2(v.z, v.w));
}

__device__ __forceinline__ float low_bf16(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float4 load4(const bf16* p) {
  uint2 v = *reinterpret_cast<const uint2*>(p);
  return make_float4(low_bf16(v.x), high_bf16(v.x), low_bf16(v.y), high_bf16(v.y));
}

// Eight bf16 numbers, as one 16-byte load brings them.
__device__ __forceinline__ void unpack8(uint4 v, float* out) {
  const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out[2 * i] = low_bf16(pairs[i]);
    out[2 * i + 1] = high_bf16(pairs[i]);
  }
}

__device__ __forceinline__ uint4 pack8(const float* v) {
  return make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}

// Reductions, in an order that depends on the block's width alone.

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// `combine` over a warp; every lane gets the result.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) {
    value = combine(value, __shfl_xor_sync(WARP_ALL, value, distance));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) { return warp_reduce(value, Sum()); }

// `combine` over a block; every thread gets the result. `parts` is shared memory for 32 values that nothing
// else uses since the last barrier; another call with the same `parts` needs a barrier between.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, T neutral, T* parts, Combine combine) {
  value = warp_reduce(value, combine);
  if (lane_id() == 0) parts[warp_id()] = value;
  __syncthreads();
  value = lane_id() < static_cast<int>(blockDim.x >> 5) ? parts[lane_id()] : neutral;
  return warp_reduce(value, combine);
}

__device__ __forceinline__ float block_sum(float value, float* parts) {
  return block_reduce(value, 0.0f, parts, Sum());
}
