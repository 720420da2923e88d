# SPDX-License-Identifier: Apache-2.0
"""What is used of HIP, which Hygon's DTK implements under the same names.

Source: ``hip/hip_runtime_api.h`` and ``hip/driver_types.h`` of HIP 5.2 (Debian) and 7.1 (Triton's wheel);
everything here is compared with both in the tests.
"""

from __future__ import annotations

import ctypes

from sage_kv_connector.vendors.common.c_interface import CInterface, SizeBound

#: ``hipIpcMemLazyEnablePeerAccess``, the only flag there is: 1 in HIP 7.1, 0 in 5.2.
IPC_FLAGS = (1, 0)


class IpcHandle(ctypes.Structure):
    """``hipIpcMemHandle_t``."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


class DeviceProperties(SizeBound):
    """``hipDeviceProp_t``: 792 bytes in HIP 5.2, 1472 in 7.1."""

    _fields_ = (("unknown", ctypes.c_char * 8192),)


HIP = CInterface(
    vendor="hygon",
    title="HIP",
    # DTK's own first: AMD's library on a node with DCUs would not find them.
    sonames=("libgalaxyhip.so.5", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5"),
    folders=("$ROCM_PATH/lib", "/opt/dtk/lib", "/opt/dtk/hip/lib"),
    types={
        "hipError_t": ctypes.c_uint,
        "hipStream_t": ctypes.c_void_p,
        "hipEvent_t": ctypes.c_void_p,
        "hipDeviceptr_t": ctypes.c_void_p,
        "hipDevice_t": ctypes.c_int,
        "hipMemcpyKind": ctypes.c_uint,
        "hipIpcMemHandle_t": IpcHandle,
        "hipModule_t": ctypes.c_void_p,
        "hipFunction_t": ctypes.c_void_p,
        "hipDeviceProp_t": DeviceProperties,
    },
    declarations="""
        const char *hipGetErrorString(hipError_t hipError);
        hipError_t hipGetDeviceCount(int *count);
        hipError_t hipSetDevice(int deviceId);
        hipError_t hipDeviceGetName(char *name, int len, hipDevice_t device);
        hipError_t hipGetDeviceProperties(hipDeviceProp_t *prop, int deviceId);
        hipError_t hipDeviceGetPCIBusId(char *pciBusId, int len, int device);
        hipError_t hipMemGetInfo(size_t *free, size_t *total);
        hipError_t hipMalloc(void **ptr, size_t size);
        hipError_t hipFree(void *ptr);
        hipError_t hipHostMalloc(void **ptr, size_t size, unsigned int flags);
        hipError_t hipHostFree(void *ptr);
        hipError_t hipHostRegister(void *hostPtr, size_t sizeBytes, unsigned int flags);
        hipError_t hipHostUnregister(void *hostPtr);
        hipError_t hipMemGetAddressRange(hipDeviceptr_t *pbase, size_t *psize, hipDeviceptr_t dptr);
        hipError_t hipStreamCreateWithFlags(hipStream_t *stream, unsigned int flags);
        hipError_t hipStreamDestroy(hipStream_t stream);
        hipError_t hipStreamSynchronize(hipStream_t stream);
        hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned int flags);
        hipError_t hipMemcpyAsync(void *dst, const void *src, size_t sizeBytes, hipMemcpyKind kind,
                                  hipStream_t stream);
        hipError_t hipMemcpyPeerAsync(void *dst, int dstDeviceId, const void *src, int srcDevice,
                                      size_t sizeBytes, hipStream_t stream);
        hipError_t hipDeviceCanAccessPeer(int *canAccessPeer, int deviceId, int peerDeviceId);
        hipError_t hipDeviceEnablePeerAccess(int peerDeviceId, unsigned int flags);
        hipError_t hipModuleLoadData(hipModule_t *module, const void *image);
        hipError_t hipModuleGetFunction(hipFunction_t *function, hipModule_t module, const char *kname);
        hipError_t hipModuleLaunchKernel(hipFunction_t f, unsigned int gridDimX, unsigned int gridDimY,
                                         unsigned int gridDimZ, unsigned int blockDimX, unsigned int blockDimY,
                                         unsigned int blockDimZ, unsigned int sharedMemBytes, hipStream_t stream,
                                         void **kernelParams, void **extra);
        hipError_t hipEventCreateWithFlags(hipEvent_t *event, unsigned int flags);
        hipError_t hipEventDestroy(hipEvent_t event);
        hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream);
        hipError_t hipEventQuery(hipEvent_t event);
        hipError_t hipEventSynchronize(hipEvent_t event);
        hipError_t hipIpcGetMemHandle(hipIpcMemHandle_t *handle, void *devPtr);
        hipError_t hipIpcOpenMemHandle(void **devPtr, hipIpcMemHandle_t handle, unsigned int flags);
        hipError_t hipIpcCloseMemHandle(void *devPtr);
    """,
    # Not of the emulator, which has none of a GPU's. Newer headers call a newer form by this name; libraries keep the
    # symbol for the older one.
    optional=frozenset({"hipGetDeviceProperties"}),
    newer_forms={"hipGetDeviceProperties": "hipGetDevicePropertiesR0600"},
    constants={
        "hipMemcpyHostToHost": 0,
        "hipMemcpyHostToDevice": 1,
        "hipMemcpyDeviceToHost": 2,
        "hipMemcpyDeviceToDevice": 3,
        "hipStreamNonBlocking": 1,
        "hipEventBlockingSync": 1,
        "hipEventDisableTiming": 2,
        "hipHostMallocPortable": 1,
        "hipHostRegisterPortable": 1,
    },
    errors={
        "hipSuccess": 0,
        "hipErrorInvalidValue": 1,
        "hipErrorOutOfMemory": 2,
        "hipErrorNotInitialized": 3,
        "hipErrorDeinitialized": 4,
        "hipErrorInvalidDevicePointer": 17,
        "hipErrorInvalidMemcpyDirection": 21,
        "hipErrorInsufficientDriver": 35,
        "hipErrorNoDevice": 100,
        "hipErrorInvalidDevice": 101,
        "hipErrorInvalidImage": 200,
        "hipErrorInvalidContext": 201,
        "hipErrorMapFailed": 205,
        "hipErrorNoBinaryForGpu": 209,
        "hipErrorECCNotCorrectable": 214,
        "hipErrorPeerAccessUnsupported": 217,
        "hipErrorInvalidKernelFile": 218,
        "hipErrorInvalidHandle": 400,
        "hipErrorIllegalState": 401,
        "hipErrorNotFound": 500,
        "hipErrorNotReady": 600,
        "hipErrorIllegalAddress": 700,
        "hipErrorLaunchOutOfResources": 701,
        "hipErrorLaunchTimeOut": 702,
        "hipErrorPeerAccessAlreadyEnabled": 704,
        "hipErrorPeerAccessNotEnabled": 705,
        "hipErrorContextIsDestroyed": 709,
        "hipErrorHostMemoryAlreadyRegistered": 712,
        "hipErrorHostMemoryNotRegistered": 713,
        "hipErrorLaunchFailure": 719,
        "hipErrorNotSupported": 801,
        "hipErrorUnknown": 999,
        "hipErrorRuntimeMemory": 1052,
        "hipErrorRuntimeOther": 1053,
    },
)
