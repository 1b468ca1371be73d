// The emulated cuBLAS: handles, workspace, and GemmEx with the real one's checks.
#include <cstring>

#include "../driver/memory.h"
#include "../driver/world.h"
#include "gemm.h"

namespace emu {

struct Blas {
  Context* context;
  CUstream stream = nullptr;
  void* workspace = nullptr;  // the program's; null: the library's own
  size_t workspace_bytes = 0;
};

namespace {

constexpr size_t ALIGNMENT = 256;  // of a workspace

bool known(DataType type) { return type == TYPE_F32 || type == TYPE_BF16; }
size_t width(DataType type) { return type == TYPE_BF16 ? 2 : 4; }

// Bytes of a column-major matrix of which `rows` of each column are used.
size_t extent(int rows, int columns, int ld, DataType type) {
  return (size_t(ld) * size_t(columns - 1) + size_t(rows)) * width(type);
}

Status refuse(Status status, const char* why) {
  report("cublasGemmEx refused: %s", why);
  return status;
}

Status check(const Blas& blas, const Product& p, bool capturing) {
  const Matrix &a = p.a, &b = p.b;
  if (!known(a.type) || !known(b.type) || !known(p.c_type) || a.type != b.type)
    return refuse(BLAS_NOT_SUPPORTED,
                  "this combination of types is not one of bf16 or f32 in, f32 or bf16 out");
  if (a.type == TYPE_F32 && p.c_type == TYPE_BF16) return refuse(BLAS_NOT_SUPPORTED, "f32 in, bf16 out");
  if (p.m < 0 || p.n < 0 || p.k < 0) return refuse(BLAS_INVALID_VALUE, "a negative size");
  int a_rows = a.transposed ? p.k : p.m, b_rows = b.transposed ? p.n : p.k;
  if (a.ld < std::max(1, a_rows)) return refuse(BLAS_INVALID_VALUE, "lda is less than the rows of a");
  if (b.ld < std::max(1, b_rows)) return refuse(BLAS_INVALID_VALUE, "ldb is less than the rows of b");
  if (p.c_ld < std::max(1, p.m)) return refuse(BLAS_INVALID_VALUE, "ldc is less than the rows of c");
  if (capturing && !blas.workspace)
    return refuse(BLAS_NOT_SUPPORTED,
                  "it is captured without a workspace of the program's: set one after cublasSetStream, which "
                  "resets it");
  return BLAS_SUCCESS;
}

const char* outside(const Product& p) {
  const Matrix &a = p.a, &b = p.b;
  int a_rows = a.transposed ? p.k : p.m, a_columns = a.transposed ? p.m : p.k;
  int b_rows = b.transposed ? p.n : p.k, b_columns = b.transposed ? p.k : p.n;
  if (p.k && !is_live(Place::Device, a.values, extent(a_rows, a_columns, a.ld, a.type))) return "a";
  if (p.k && !is_live(Place::Device, b.values, extent(b_rows, b_columns, b.ld, b.type))) return "b";
  if (!is_live(Place::Device, p.c, extent(p.m, p.n, p.c_ld, p.c_type))) return "c";
  return nullptr;
}

// The real library uses the workspace as it likes: what a program keeps in it is lost.
void spoil(void* workspace, size_t bytes) {
  constexpr size_t EDGE = 4096;
  if (!workspace) return;
  if (bytes <= 2 * EDGE) {
    memset(workspace, 0xff, bytes);
    return;
  }
  memset(workspace, 0xff, EDGE);
  memset(static_cast<char*>(workspace) + bytes - EDGE, 0xff, EDGE);
}

}  // namespace
}  // namespace emu

using namespace emu;

RIG_API Status cublasCreate_v2(Blas** out) {
  if (!current_context()) {
    report("cublasCreate without a current context");
    return BLAS_NOT_INITIALIZED;
  }
  *out = new Blas{current_context()};
  return BLAS_SUCCESS;
}
RIG_API Status cublasDestroy_v2(Blas* blas) {
  // Products in streams hold what they need themselves.
  delete blas;
  return BLAS_SUCCESS;
}
RIG_API Status cublasGetVersion_v2(Blas*, int* version) {
  *version = 120901;
  return BLAS_SUCCESS;
}
RIG_API Status cublasGetProperty(int which, int* value) {
  static const int VERSION[] = {12, 9, 1};
  if (which < 0 || which > 2) return BLAS_INVALID_VALUE;
  *value = VERSION[which];
  return BLAS_SUCCESS;
}
RIG_API Status cublasSetStream_v2(Blas* blas, CUstream stream) {
  blas->stream = stream;
  blas->workspace = nullptr;  // documented: back to the library's own
  blas->workspace_bytes = 0;
  return BLAS_SUCCESS;
}
RIG_API Status cublasGetStream_v2(Blas* blas, CUstream* stream) {
  *stream = blas->stream;
  return BLAS_SUCCESS;
}
RIG_API Status cublasSetWorkspace_v2(Blas* blas, void* workspace, size_t bytes) {
  if (uintptr_t(workspace) % ALIGNMENT || !is_live(Place::Device, workspace, bytes)) {
    report("cublasSetWorkspace: %zu bytes at %p are misaligned or not live device memory", bytes, workspace);
    return BLAS_INVALID_VALUE;
  }
  blas->workspace = workspace;
  blas->workspace_bytes = bytes;
  return BLAS_SUCCESS;
}
RIG_API Status cublasSetMathMode(Blas*, int) { return BLAS_SUCCESS; }
RIG_API Status cublasSetPointerMode_v2(Blas*, int mode) {
  if (mode) report("cublasSetPointerMode: scalars on the device are not emulated");
  return mode ? BLAS_NOT_SUPPORTED : BLAS_SUCCESS;
}

RIG_API Status cublasGemmEx(Blas* blas, Operation a_op, Operation b_op, int m, int n, int k,
                            const void* alpha, const void* a, DataType a_type, int lda, const void* b,
                            DataType b_type, int ldb, const void* beta, void* c, DataType c_type, int ldc,
                            int compute, int) {
  if (!blas || !alpha || !beta) return BLAS_INVALID_VALUE;
  if (compute != COMPUTE_32F && compute != COMPUTE_32F_FAST_16BF && compute != COMPUTE_32F_FAST_TF32)
    return refuse(BLAS_NOT_SUPPORTED, "only sums in f32 are emulated");
  if (!current_context() || current_context() != blas->context)
    return refuse(BLAS_EXECUTION_FAILED, "the current device is not the handle's");
  Stream* stream = stream_of(blas->stream);
  if (!stream || stream->context != blas->context)
    return refuse(BLAS_EXECUTION_FAILED, "the stream is not one of the handle's device");
  float alpha_value, beta_value;
  memcpy(&alpha_value, alpha, 4);
  memcpy(&beta_value, beta, 4);
  Product product{
      m, n,      k,  alpha_value, beta_value, {a, a_type, lda, a_op != OP_N}, {b, b_type, ldb, b_op != OP_N},
      c, c_type, ldc};
  if (Status refused = check(*blas, product, is_capturing(stream))) return refused;
  if (!m || !n) return BLAS_SUCCESS;
  Context* context = blas->context;
  void* workspace = blas->workspace;
  size_t workspace_bytes = blas->workspace_bytes;
  auto step = [=] {
    if (const char* which = outside(product)) {
      report("cublasGemmEx (m %d, n %d, k %d): matrix %s is not wholly in one live device allocation", m, n,
             k, which);
      kill_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
      return true;
    }
    if (workspace && !is_live(Place::Device, workspace, workspace_bytes)) {
      report("cublasGemmEx: its workspace was freed");
      kill_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
      return true;
    }
    spoil(workspace, workspace_bytes);
    multiply(product);
    return true;
  };
  return put(stream, {"cublasGemmEx", step, nullptr}) ? BLAS_EXECUTION_FAILED : BLAS_SUCCESS;
}
