// The functions that the scenarios call, as a program would declare them.
#pragma once

#include "blas/api.h"
#include "driver/api.h"
#include "nccl/api.h"

namespace emu {
struct Blas;
struct Communicator;
}  // namespace emu
using Comm = emu::Communicator*;

extern "C" {
CUresult cuInit(unsigned);
CUresult cuDevicePrimaryCtxRetain(CUcontext*, CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuCtxSynchronize();
CUresult cuMemGetInfo_v2(size_t*, size_t*);
CUresult cuMemAlloc_v2(CUdeviceptr*, size_t);
CUresult cuMemFree_v2(CUdeviceptr);
CUresult cuMemHostAlloc(void**, size_t, unsigned);
CUresult cuMemFreeHost(void*);
CUresult cuMemcpyHtoD_v2(CUdeviceptr, const void*, size_t);
CUresult cuMemcpyDtoH_v2(void*, CUdeviceptr, size_t);
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, CUstream);
CUresult cuMemcpyDtoHAsync_v2(void*, CUdeviceptr, size_t, CUstream);
CUresult cuStreamCreate(CUstream*, unsigned);
CUresult cuStreamSynchronize(CUstream);
CUresult cuStreamWaitEvent(CUstream, CUevent, unsigned);
CUresult cuStreamBeginCapture_v2(CUstream, CUstreamCaptureMode);
CUresult cuStreamEndCapture(CUstream, CUgraph*);
CUresult cuEventCreate(CUevent*, unsigned);
CUresult cuEventRecord(CUevent, CUstream);
CUresult cuEventQuery(CUevent);
CUresult cuGraphInstantiateWithFlags(CUgraphExec*, CUgraph, unsigned long long);
CUresult cuGraphLaunch(CUgraphExec, CUstream);
CUresult cuGraphDestroy(CUgraph);
CUresult cuGraphExecDestroy(CUgraphExec);
CUresult cuModuleLoadData(CUmodule*, const void*);
CUresult cuModuleGetFunction(CUfunction*, CUmodule, const char*);
CUresult cuFuncGetParamInfo(CUfunction, size_t, size_t*, size_t*);
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int);
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        CUstream, void**, void**);
Status cublasCreate_v2(emu::Blas**);
Status cublasSetStream_v2(emu::Blas*, CUstream);
Status cublasSetWorkspace_v2(emu::Blas*, void*, size_t);
Status cublasGemmEx(emu::Blas*, Operation, Operation, int, int, int, const void*, const void*, DataType, int,
                    const void*, DataType, int, const void*, void*, DataType, int, int, int);
Result ncclGetUniqueId(NcclId*);
Result ncclCommInitRank(Comm*, int, NcclId, int);
Result ncclCommInitRankConfig(Comm*, int, NcclId, int, const NcclConfig*);
Result ncclCommGetAsyncError(Comm, Result*);
Result ncclCommAbort(Comm);
Result ncclCommFinalize(Comm);
Result ncclCommDestroy(Comm);
Result ncclAllReduce(const void*, void*, size_t, NcclType, NcclOp, Comm, CUstream);
Result ncclAllGather(const void*, void*, size_t, NcclType, Comm, CUstream);
Result ncclBroadcast(const void*, void*, size_t, NcclType, int, Comm, CUstream);
Result ncclSend(const void*, size_t, NcclType, int, Comm, CUstream);
Result ncclRecv(void*, size_t, NcclType, int, Comm, CUstream);
Result ncclGroupStart();
Result ncclGroupEnd();
}
