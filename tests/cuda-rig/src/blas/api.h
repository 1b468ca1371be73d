// The numbers of cuBLAS that a program passes.
#pragma once

#include "../driver/api.h"

enum Status : int {
  BLAS_SUCCESS = 0,
  BLAS_NOT_INITIALIZED = 1,
  BLAS_ALLOC_FAILED = 3,
  BLAS_INVALID_VALUE = 7,
  BLAS_ARCH_MISMATCH = 8,
  BLAS_EXECUTION_FAILED = 13,
  BLAS_NOT_SUPPORTED = 15,
};

enum Operation : int { OP_N = 0, OP_T = 1, OP_C = 2 };
enum DataType : int { TYPE_F32 = 0, TYPE_BF16 = 14 };
enum ComputeType : int { COMPUTE_32F = 68, COMPUTE_32F_FAST_16BF = 75, COMPUTE_32F_FAST_TF32 = 77 };
