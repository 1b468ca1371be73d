// CUDA C++ for g++: what the product's kernels need of it, checked where the device would not check.
//
// A kernel file is compiled unchanged: it includes its device.cuh, which includes this header when TANDEM_RIG
// is defined. Everything a kernel file defines ends up in an unnamed namespace (src/runtime/kernel_unit.cc),
// so files do not clash.
#pragma once

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "rig/atomics.h"
#include "rig/bf16.h"
#include "rig/block.h"
#include "rig/kernel.h"
#include "rig/math.h"
#include "rig/mma.h"
#include "rig/vectors.h"
#include "rig/warp.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(N) __attribute__((aligned(N)))
#define __constant__ static const
// One section for all of a library's static shared memory: it is poisoned as a whole before each block.
#define __shared__ static __attribute__((section("rig_shared")))

// Dynamic shared memory: `DYNAMIC_SHARED(float, tile);` declares `float* tile` at its start (aligned to 128
// bytes).
#define DYNAMIC_SHARED(TYPE, NAME) TYPE* NAME = reinterpret_cast<TYPE*>(rig::dynamic_shared)

#define threadIdx (rig::current->thread)
#define blockIdx (rig::shape.block_index)
#define blockDim (rig::shape.block_dim)
#define gridDim (rig::shape.grid_dim)
constexpr int warpSize = 32;

[[noreturn]] inline void __trap() { rig::fail("__trap"); }
