// The numbers of NCCL that a program passes.
#pragma once

#include "../driver/api.h"

enum Result : int {
  NCCL_SUCCESS = 0,
  NCCL_UNHANDLED_CUDA_ERROR = 1,
  NCCL_SYSTEM_ERROR = 2,
  NCCL_INTERNAL_ERROR = 3,
  NCCL_INVALID_ARGUMENT = 4,
  NCCL_INVALID_USAGE = 5,
  NCCL_REMOTE_ERROR = 6,
  NCCL_IN_PROGRESS = 7,
};

enum NcclType : int {
  NCCL_INT8 = 0,
  NCCL_UINT8 = 1,
  NCCL_INT32 = 2,
  NCCL_UINT32 = 3,
  NCCL_INT64 = 4,
  NCCL_UINT64 = 5,
  NCCL_FLOAT32 = 7,
  NCCL_FLOAT64 = 8,
  NCCL_BFLOAT16 = 9,
};
enum NcclOp : int { NCCL_SUM = 0, NCCL_PROD = 1, NCCL_MAX = 2, NCCL_MIN = 3 };

struct NcclId {
  char text[128];
};

// The head of ncclConfig_t; what follows is not looked at.
struct NcclConfig {
  size_t size;
  unsigned magic, version;
  int blocking;
};
constexpr unsigned NCCL_CONFIG_MAGIC = 0xcafebeef;
