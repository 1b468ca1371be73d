// What the planted kernels include, in place of the product's header of this name.
#pragma once

#ifdef TANDEM_RIG
#include "cuda_shim.h"
typedef __nv_bfloat16 bf16;
#else
#define KERNEL(THREADS, NAME, PARAMETERS) \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME PARAMETERS
#define DYNAMIC_SHARED(TYPE, NAME)                          \
  extern __shared__ __align__(128) unsigned char dynamic[]; \
  TYPE* NAME = reinterpret_cast<TYPE*>(dynamic)
#endif
