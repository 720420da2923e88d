# SPDX-License-Identifier: Apache-2.0
"""What is used of the CUDA driver interface.

Source: ``cuda.h`` of CUDA 13; everything here is compared with it in the tests.
"""

from __future__ import annotations

import ctypes

from sage_kv_connector.vendors.common.c_interface import CInterface


class IpcHandle(ctypes.Structure):
    """``CUipcMemHandle``."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


class MemoryLocation(ctypes.Structure):
    """``CUmemLocation``."""

    _fields_ = (("type", ctypes.c_uint), ("id", ctypes.c_int))


class CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_uint),
        ("srcLocHint", MemoryLocation),
        ("dstLocHint", MemoryLocation),
        ("flags", ctypes.c_uint),
    )


CUDA = CInterface(
    vendor="nvidia",
    title="CUDA driver",
    sonames=("libcuda.so.1",),
    folders=(),
    types={
        "CUresult": ctypes.c_uint,
        "CUdevice": ctypes.c_int,
        "CUdeviceptr": ctypes.c_ulonglong,
        "CUcontext": ctypes.c_void_p,
        "CUstream": ctypes.c_void_p,
        "CUevent": ctypes.c_void_p,
        "CUmodule": ctypes.c_void_p,
        "CUfunction": ctypes.c_void_p,
        "CUdevice_attribute": ctypes.c_uint,
        "CUipcMemHandle": IpcHandle,
        "CUmemLocation": MemoryLocation,
        "CUmemcpyAttributes": CopyAttributes,
    },
    declarations="""
        CUresult cuInit(unsigned int Flags);
        CUresult cuGetErrorString(CUresult error, const char **pStr);
        CUresult cuDeviceGetCount(int *count);
        CUresult cuDeviceGet(CUdevice *device, int ordinal);
        CUresult cuDeviceGetName(char *name, int len, CUdevice dev);
        CUresult cuDeviceGetPCIBusId(char *pciBusId, int len, CUdevice dev);
        CUresult cuDeviceGetAttribute(int *pi, CUdevice_attribute attrib, CUdevice dev);
        CUresult cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev);
        CUresult cuCtxPushCurrent(CUcontext ctx);
        CUresult cuCtxPopCurrent(CUcontext *pctx);
        CUresult cuMemGetInfo(size_t *free, size_t *total);
        CUresult cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);
        CUresult cuMemFree(CUdeviceptr dptr);
        CUresult cuMemHostAlloc(void **pp, size_t bytesize, unsigned int Flags);
        CUresult cuMemFreeHost(void *p);
        CUresult cuMemHostRegister(void *p, size_t bytesize, unsigned int Flags);
        CUresult cuMemHostUnregister(void *p);
        CUresult cuMemGetAddressRange(CUdeviceptr *pbase, size_t *psize, CUdeviceptr dptr);
        CUresult cuStreamCreate(CUstream *phStream, unsigned int Flags);
        CUresult cuStreamDestroy(CUstream hStream);
        CUresult cuStreamSynchronize(CUstream hStream);
        CUresult cuStreamWaitEvent(CUstream hStream, CUevent hEvent, unsigned int Flags);
        CUresult cuMemcpyHtoDAsync(CUdeviceptr dstDevice, const void *srcHost, size_t ByteCount,
                                   CUstream hStream);
        CUresult cuMemcpyDtoHAsync(void *dstHost, CUdeviceptr srcDevice, size_t ByteCount, CUstream hStream);
        CUresult cuMemcpyDtoDAsync(CUdeviceptr dstDevice, CUdeviceptr srcDevice, size_t ByteCount,
                                   CUstream hStream);
        CUresult cuMemcpyPeerAsync(CUdeviceptr dstDevice, CUcontext dstContext, CUdeviceptr srcDevice,
                                   CUcontext srcContext, size_t ByteCount, CUstream hStream);
        CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count,
                                    CUmemcpyAttributes *attrs, size_t *attrsIdxs, size_t numAttrs,
                                    CUstream hStream);
        CUresult cuDeviceCanAccessPeer(int *canAccessPeer, CUdevice dev, CUdevice peerDev);
        CUresult cuCtxEnablePeerAccess(CUcontext peerContext, unsigned int Flags);
        CUresult cuModuleLoadData(CUmodule *module, const void *image);
        CUresult cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name);
        CUresult cuLaunchKernel(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,
                                unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,
                                unsigned int sharedMemBytes, CUstream hStream, void **kernelParams, void **extra);
        CUresult cuEventCreate(CUevent *phEvent, unsigned int Flags);
        CUresult cuEventDestroy(CUevent hEvent);
        CUresult cuEventRecord(CUevent hEvent, CUstream hStream);
        CUresult cuEventQuery(CUevent hEvent);
        CUresult cuEventSynchronize(CUevent hEvent);
        CUresult cuIpcGetMemHandle(CUipcMemHandle *pHandle, CUdeviceptr dptr);
        CUresult cuIpcOpenMemHandle(CUdeviceptr *pdptr, CUipcMemHandle handle, unsigned int Flags);
        CUresult cuIpcCloseMemHandle(CUdeviceptr dptr);
    """,
    optional=frozenset({"cuMemcpyBatchAsync"}),  # drivers of CUDA 13
    # Drivers of CUDA 12.8 and 12.9, and newer ones too.
    older_declarations="""
        CUresult cuMemcpyBatchAsync(CUdeviceptr *dsts, CUdeviceptr *srcs, size_t *sizes, size_t count,
                                    CUmemcpyAttributes *attrs, size_t *attrsIdxs, size_t numAttrs,
                                    size_t *failIdx, CUstream hStream);
    """,
    older_define="__CUDA_API_VERSION_INTERNAL",
    # cuda.h renames these; a library has the old forms under the plain names.
    renamed={
        "cuCtxPushCurrent": "cuCtxPushCurrent_v2",
        "cuCtxPopCurrent": "cuCtxPopCurrent_v2",
        "cuMemGetInfo": "cuMemGetInfo_v2",
        "cuMemAlloc": "cuMemAlloc_v2",
        "cuMemFree": "cuMemFree_v2",
        "cuMemHostRegister": "cuMemHostRegister_v2",
        "cuMemGetAddressRange": "cuMemGetAddressRange_v2",
        "cuStreamDestroy": "cuStreamDestroy_v2",
        "cuMemcpyHtoDAsync": "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync": "cuMemcpyDtoHAsync_v2",
        "cuMemcpyDtoDAsync": "cuMemcpyDtoDAsync_v2",
        "cuMemcpyBatchAsync": "cuMemcpyBatchAsync_v2",
        "cuEventDestroy": "cuEventDestroy_v2",
        "cuIpcOpenMemHandle": "cuIpcOpenMemHandle_v2",
    },
    constants={
        "CU_STREAM_NON_BLOCKING": 1,
        "CU_EVENT_BLOCKING_SYNC": 1,
        "CU_EVENT_DISABLE_TIMING": 2,
        "CU_MEMHOSTALLOC_PORTABLE": 1,
        "CU_MEMHOSTREGISTER_PORTABLE": 1,
        "CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS": 1,
        "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM": 1,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": 75,
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": 76,
    },
    errors={
        "CUDA_SUCCESS": 0,
        "CUDA_ERROR_INVALID_VALUE": 1,
        "CUDA_ERROR_OUT_OF_MEMORY": 2,
        "CUDA_ERROR_NOT_INITIALIZED": 3,
        "CUDA_ERROR_DEINITIALIZED": 4,
        "CUDA_ERROR_DEVICE_UNAVAILABLE": 46,
        "CUDA_ERROR_NO_DEVICE": 100,
        "CUDA_ERROR_INVALID_DEVICE": 101,
        "CUDA_ERROR_INVALID_IMAGE": 200,
        "CUDA_ERROR_INVALID_CONTEXT": 201,
        "CUDA_ERROR_MAP_FAILED": 205,
        "CUDA_ERROR_NO_BINARY_FOR_GPU": 209,
        "CUDA_ERROR_ECC_UNCORRECTABLE": 214,
        "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": 217,
        "CUDA_ERROR_INVALID_PTX": 218,
        "CUDA_ERROR_NVLINK_UNCORRECTABLE": 220,
        "CUDA_ERROR_OPERATING_SYSTEM": 304,
        "CUDA_ERROR_INVALID_HANDLE": 400,
        "CUDA_ERROR_ILLEGAL_STATE": 401,
        "CUDA_ERROR_NOT_FOUND": 500,
        "CUDA_ERROR_NOT_READY": 600,
        "CUDA_ERROR_ILLEGAL_ADDRESS": 700,
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": 701,
        "CUDA_ERROR_LAUNCH_TIMEOUT": 702,
        "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED": 704,
        "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED": 705,
        "CUDA_ERROR_CONTEXT_IS_DESTROYED": 709,
        "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": 712,
        "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED": 713,
        "CUDA_ERROR_ILLEGAL_INSTRUCTION": 715,
        "CUDA_ERROR_MISALIGNED_ADDRESS": 716,
        "CUDA_ERROR_LAUNCH_FAILED": 719,
        "CUDA_ERROR_NOT_PERMITTED": 800,
        "CUDA_ERROR_NOT_SUPPORTED": 801,
        "CUDA_ERROR_SYSTEM_NOT_READY": 802,
        "CUDA_ERROR_EXTERNAL_DEVICE": 911,
        "CUDA_ERROR_UNKNOWN": 999,
    },
)
