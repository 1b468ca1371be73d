// One kernel file as one translation unit. The unnamed namespace gives all it defines internal linkage: two
// files may have helpers of one name, and static shared memory of templates stays out of COMDAT sections.
#include "cuda_shim.h"

namespace {
#include RIG_KERNEL_FILE
}
