# SPDX-License-Identifier: Apache-2.0
"""What is used of CNRT, Cambricon's runtime, and of CNDrv below it, which launches kernels.

Sources: ``cnrt.h`` of CNRT 6.0.2 and 6.14.1 as found in public copies, and its use in Cambricon's
torch_mlu; ``cn_api.h`` of CNDrv 2.15.5 as found in a public copy. No package registry carries the headers; see
docs/vendors.md for what was checked.
"""

from __future__ import annotations

import ctypes

from sage_kv_connector.vendors.common.c_interface import CInterface


class PointerAttributes(ctypes.Structure):
    """``cnrtPointerAttributes_t``."""

    _fields_ = (
        ("type", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("size", ctypes.c_size_t),
        ("devicePointer", ctypes.c_void_p),
        ("hostPointer", ctypes.c_void_p),
        ("cacheMode", ctypes.c_int),
        ("deviceBasePointer", ctypes.c_void_p),
    )


#: ``cnrtIpcMemHandle`` is a pointer by type, but its value is the handle.
IPC_HANDLE_BYTES = ctypes.sizeof(ctypes.c_void_p)

#: Functions of CNDrv: without its library there are no kernels.
CNDRV = (
    "cnDeviceGet", "cnDeviceGetAttribute", "cnModuleLoadFatBinary", "cnModuleGetKernel", "cnInvokeKernel",
)  # fmt: skip

CNRT = CInterface(
    vendor="cambricon",
    title="CNRT",
    sonames=("libcnrt.so",),
    folders=("$NEUWARE_HOME/lib64", "/usr/local/neuware/lib64"),
    types={
        "cnrtRet_t": ctypes.c_uint,
        "cnrtQueue_t": ctypes.c_void_p,
        "cnrtNotifier_t": ctypes.c_void_p,
        "cnrtMemTransDir_t": ctypes.c_uint,
        "cnrtIpcMemHandle": ctypes.c_void_p,
        "cnrtPointerAttributes_t": PointerAttributes,
        "CNresult": ctypes.c_uint,
        "CNdev": ctypes.c_uint64,
        "CNdevice_attribute": ctypes.c_uint,
        "CNmodule": ctypes.c_void_p,
        "CNkernel": ctypes.c_void_p,
        "CNqueue": ctypes.c_void_p,
        "KernelClass": ctypes.c_uint,
    },
    declarations="""
        const char *cnrtGetErrorStr(cnrtRet_t error);
        cnrtRet_t cnrtGetLastError(void);
        cnrtRet_t cnrtGetDeviceCount(unsigned int *pCount);
        cnrtRet_t cnrtSetDevice(int ordinal);
        cnrtRet_t cnrtDeviceGetPCIBusId(char *pciBusId, int len, int device);
        cnrtRet_t cnrtMemGetInfo(size_t *free, size_t *total);
        cnrtRet_t cnrtMalloc(void **pPtr, size_t bytes);
        cnrtRet_t cnrtFree(void *ptr);
        cnrtRet_t cnrtHostMalloc(void **pPtr, size_t bytes);
        cnrtRet_t cnrtFreeHost(void *ptr);
        cnrtRet_t cnrtPointerGetAttributes(cnrtPointerAttributes_t *attr, const void *ptr);
        cnrtRet_t cnrtMemcpyAsync_V3(void *dst, void *src, size_t bytes, cnrtQueue_t queue,
                                     cnrtMemTransDir_t dir);
        cnrtRet_t cnrtMemcpyAsync_V2(void *dst, void *src, size_t bytes, cnrtQueue_t queue,
                                     cnrtMemTransDir_t dir);
        cnrtRet_t cnrtMemcpyAsync(void *dst, void *src, size_t bytes, cnrtQueue_t queue,
                                  cnrtMemTransDir_t dir);
        cnrtRet_t cnrtMemcpyPeerAsync(void *dst, int dstDev, void *src, int srcDev, size_t bytes,
                                      cnrtQueue_t queue);
        cnrtRet_t cnrtGetPeerAccessibility(unsigned int *canAccess, int ordinal, int peerOrdinal);
        cnrtRet_t cnrtQueueCreate(cnrtQueue_t *pQueue);
        cnrtRet_t cnrtQueueDestroy(cnrtQueue_t queue);
        cnrtRet_t cnrtQueueSync(cnrtQueue_t queue);
        cnrtRet_t cnrtQueueWaitNotifier(cnrtNotifier_t notifier, cnrtQueue_t queue, unsigned int flag);
        cnrtRet_t cnrtNotifierCreateWithFlags(cnrtNotifier_t *pNotifier, unsigned int flags);
        cnrtRet_t cnrtNotifierDestroy(cnrtNotifier_t notifier);
        cnrtRet_t cnrtPlaceNotifier(cnrtNotifier_t notifier, cnrtQueue_t queue);
        cnrtRet_t cnrtQueryNotifier(cnrtNotifier_t notifier);
        cnrtRet_t cnrtWaitNotifier(cnrtNotifier_t notifier);
        cnrtRet_t cnrtAcquireMemHandle(cnrtIpcMemHandle *handle, void *ptr);
        cnrtRet_t cnrtMapMemHandle(void **ptr, cnrtIpcMemHandle handle, int flags);
        cnrtRet_t cnrtUnMapMemHandle(void *ptr);
        CNresult cnDeviceGet(CNdev *pdev, int ordinal);
        CNresult cnDeviceGetAttribute(int *pi, CNdevice_attribute attrib, CNdev dev);
        CNresult cnModuleLoadFatBinary(const void *fatBin, CNmodule *phmod);
        CNresult cnModuleGetKernel(CNmodule hmod, const char *name, CNkernel *phkernel);
        CNresult cnInvokeKernel(CNkernel hkernel, unsigned int dimx, unsigned int dimy, unsigned int dimz,
                                KernelClass c, unsigned int reserve, CNqueue hqueue, void **kernelParams,
                                void **extra);
    """,
    one_of=("cnrtMemcpyAsync_V3", "cnrtMemcpyAsync_V2", "cnrtMemcpyAsync"),  # the same but for the name
    optional=frozenset(
        {"cnrtMemcpyAsync_V3", "cnrtMemcpyAsync_V2", "cnrtMemcpyAsync", "cnrtDeviceGetPCIBusId", *CNDRV}
    ),
    companions=("libcndrv.so",),
    constants={
        "cnrtMemcpyHostToDev": 0,
        "cnrtMemcpyDevToDev": 1,
        "cnrtMemcpyDevToHost": 2,
        "cnrtMemcpyHostToHost": 3,
        "cnrtMemcpyPeerToPeer": 4,
        "CNRT_NOTIFIER_DISABLE_TIMING": 2,
        "cnrtMemTypeDevice": 2,
        "CN_DEVICE_ATTRIBUTE_MLU_ISA_VERSION": 0x20A,
        "CN_DEVICE_ATTRIBUTE_IS_MULTIPLE_TENSOR_PROCESSOR": 0x20B,
        "CN_KERNEL_CLASS_BLOCK": 1,
    },
    errors={
        "cnrtSuccess": 0,
        "cnrtErrorNotReady": 1,
        "cnrtErrorInit": 100002,
        "cnrtErrorNoDevice": 100004,
        "cnrtErrorDeviceInvalid": 100005,
        "cnrtErrorArgsInvalid": 100006,
        "cnrtErrorSys": 100007,
        "cnrtErrorSysNoMem": 100010,
        "cnrtErrorInvalidResourceHandle": 100014,
        "cnrtErrorIllegalState": 100015,
        "cnrtErrorNotSupport": 100050,
        "cnrtErrorOpsNotPermitted": 100051,
        "cnrtErrorQueue": 100060,
        "cnrtErrorNoMem": 100100,
        "cnrtErrorDevice": 632006,
        "cnrtErrorMemcpyDirectionInvalid": 632013,
        "cnrtErrorBusy": 632014,
        "cnrtErrorCndrvFuncCall": 632015,
        "cnrtErrorNoCnrtContext": 632019,
        "cnrtErrorCndrvFuncNotFound": 632020,
        "cnrtErrorUnknown": 999991,
        # Of CNDrv, whose numbers CNRT has for the errors that it knows.
        "CN_INVOKE_ERROR_OUT_OF_RESOURCES": 100120,
        "CN_INVOKE_ERROR_EXECUTED_TIMEOUT": 100121,
        "CN_INVOKE_ERROR_TIMEOUT": 100122,
        "CN_INVOKE_ERROR_ILLEGAL_INSTRUCTION": 100123,
        "CN_INVOKE_ERROR_ADDRESS_SPACE": 100124,
        "CN_INVOKE_ERROR_MEMORY_MISALIGNED_ADDRESS": 100130,
        "CN_INVOKE_ERROR_MEMORY_ILLEGAL_ADDRESS": 100131,
        "CN_INVOKE_ERROR": 100200,
        "CN_CONTEXT_ERROR_INVALID": 100201,
        "CN_ERROR_INVALID_FATBIN": 100300,
        "CN_ERROR_NOT_FOUND": 100301,
        "CN_ERROR_INVALID_KERNEL": 100302,
        "CN_FATBIN_ERROR_UNSUPPORTED_VERSION": 100303,
        "CN_FATBIN_ERROR_NO_KERNEL": 101312,
        "CN_FATBIN_INVALID_IMAGE": 101313,
        "CN_FATBIN_INVALID_ARCH": 101315,
    },
)
