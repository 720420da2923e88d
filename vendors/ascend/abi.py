# SPDX-License-Identifier: Apache-2.0
"""What is used of ACL, the C interface of CANN's runtime.

Source: ``acl/acl.h``, ``acl/acl_rt.h``, ``acl/acl_base_rt.h`` and ``acl/error_codes/rt_error_codes.h`` as
in PyPI's torch-npu 2.13.0; everything here is compared with them in the tests.
"""

from __future__ import annotations

import ctypes

from sage_kv_connector.vendors.common.c_interface import CInterface


class MemoryLocation(ctypes.Structure):
    """``aclrtMemLocation``."""

    _fields_ = (("id", ctypes.c_uint), ("type", ctypes.c_uint))


class BatchAttributes(ctypes.Structure):
    """``aclrtMemcpyBatchAttr``."""

    _fields_ = (("dstLoc", MemoryLocation), ("srcLoc", MemoryLocation), ("rsv", ctypes.c_uint8 * 16))


class LoadOption(ctypes.Structure):
    """``aclrtBinaryLoadOption``."""

    _fields_ = (("type", ctypes.c_uint), ("value", ctypes.c_uint32 * 4))


class LoadOptions(ctypes.Structure):
    """``aclrtBinaryLoadOptions``."""

    _fields_ = (("options", ctypes.c_void_p), ("numOpt", ctypes.c_size_t))


class LaunchSettings(ctypes.Structure):
    """``aclrtLaunchKernelCfg``."""

    _fields_ = (("attrs", ctypes.c_void_p), ("numAttrs", ctypes.c_size_t))


class PlaceHolder(ctypes.Structure):
    """``aclrtPlaceHolderInfo``: where among a kernel's arguments the address of some of their data has to stand."""

    _fields_ = (("addrOffset", ctypes.c_uint32), ("dataOffset", ctypes.c_uint32))


#: Without these there are no kernels.
KERNELS = ("aclrtBinaryLoadFromData", "aclrtBinaryGetFunction", "aclrtLaunchKernelWithHostArgs")

#: A key is binary and always this long (the driver's; the headers name no constant for it).
IPC_KEY_BYTES = 65

ACL = CInterface(
    vendor="ascend",
    title="ACL",
    sonames=("libascendcl.so",),
    folders=("$ASCEND_HOME_PATH/lib64", "/usr/local/Ascend/ascend-toolkit/latest/lib64"),
    types={
        "aclError": ctypes.c_int,
        "aclrtStream": ctypes.c_void_p,
        "aclrtEvent": ctypes.c_void_p,
        "aclrtMemAttr": ctypes.c_uint,
        "aclrtMemMallocPolicy": ctypes.c_uint,
        "aclrtHostRegisterType": ctypes.c_uint,
        "aclrtMemcpyKind": ctypes.c_uint,
        "aclrtEventRecordedStatus": ctypes.c_uint,
        "aclrtMemLocation": MemoryLocation,
        "aclrtMemcpyBatchAttr": BatchAttributes,
        "aclrtBinHandle": ctypes.c_void_p,
        "aclrtFuncHandle": ctypes.c_void_p,
        "aclrtBinaryLoadOption": LoadOption,
        "aclrtBinaryLoadOptions": LoadOptions,
        "aclrtLaunchKernelCfg": LaunchSettings,
        "aclrtPlaceHolderInfo": PlaceHolder,
    },
    declarations="""
        aclError aclInit(const char *configPath);
        const char *aclGetRecentErrMsg(void);
        const char *aclrtGetSocName(void);
        aclError aclrtGetDeviceCount(uint32_t *count);
        aclError aclrtSetDevice(int32_t deviceId);
        aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t *free, size_t *total);
        aclError aclrtMalloc(void **devPtr, size_t size, aclrtMemMallocPolicy policy);
        aclError aclrtFree(void *devPtr);
        aclError aclrtMallocHost(void **hostPtr, size_t size);
        aclError aclrtFreeHost(void *hostPtr);
        aclError aclrtHostRegister(void *ptr, uint64_t size, aclrtHostRegisterType type, void **devPtr);
        aclError aclrtHostRegisterV2(void *ptr, uint64_t size, uint32_t flag);
        aclError aclrtHostUnregister(void *ptr);
        aclError aclrtMemGetAddressRange(void *ptr, void **pbase, size_t *psize);
        aclError aclrtCreateStream(aclrtStream *stream);
        aclError aclrtDestroyStream(aclrtStream stream);
        aclError aclrtSynchronizeStream(aclrtStream stream);
        aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event);
        aclError aclrtMemcpyAsync(void *dst, size_t destMax, const void *src, size_t count,
                                  aclrtMemcpyKind kind, aclrtStream stream);
        aclError aclrtMemcpyBatchAsync(void **dsts, size_t *destMaxs, void **srcs, size_t *sizes,
                                       size_t numBatches, aclrtMemcpyBatchAttr *attrs,
                                       size_t *attrsIndexes, size_t numAttrs, size_t *failIndex,
                                       aclrtStream stream);
        aclError aclrtDeviceCanAccessPeer(int32_t *canAccessPeer, int32_t deviceId, int32_t peerDeviceId);
        aclError aclrtDeviceEnablePeerAccess(int32_t peerDeviceId, uint32_t flags);
        aclError aclrtCreateEvent(aclrtEvent *event);
        aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag);
        aclError aclrtDestroyEvent(aclrtEvent event);
        aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream);
        aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status);
        aclError aclrtSynchronizeEvent(aclrtEvent event);
        aclError aclrtDeviceGetBareTgid(int32_t *pid);
        aclError aclrtIpcMemGetExportKey(void *devPtr, size_t size, char *key, size_t len, uint64_t flags);
        aclError aclrtIpcMemSetImportPid(const char *key, int32_t *pid, size_t num);
        aclError aclrtIpcMemImportByKey(void **devPtr, const char *key, uint64_t flags);
        aclError aclrtIpcMemClose(const char *key);
        aclError aclrtBinaryLoadFromData(const void *data, size_t length, const aclrtBinaryLoadOptions *options,
                                         aclrtBinHandle *binHandle);
        aclError aclrtBinaryGetFunction(aclrtBinHandle binHandle, const char *kernelName,
                                        aclrtFuncHandle *funcHandle);
        aclError aclrtLaunchKernelWithHostArgs(aclrtFuncHandle funcHandle, uint32_t numBlocks, aclrtStream stream,
                                               aclrtLaunchKernelCfg *cfg, void *hostArgs, size_t argsSize,
                                               aclrtPlaceHolderInfo *placeHolderArray, size_t placeHolderNum);
    """,
    optional=frozenset(
        {
            "aclGetRecentErrMsg", "aclrtHostRegister", "aclrtHostRegisterV2", "aclrtHostUnregister",
            "aclrtMemGetAddressRange", "aclrtMemcpyBatchAsync", "aclrtCreateEventExWithFlag",
            "aclrtDeviceGetBareTgid", "aclrtIpcMemGetExportKey", "aclrtIpcMemSetImportPid",
            "aclrtIpcMemImportByKey", "aclrtIpcMemClose", *KERNELS,
        }
    ),
    constants={
        "ACL_MEMCPY_HOST_TO_HOST": 0,
        "ACL_MEMCPY_HOST_TO_DEVICE": 1,
        "ACL_MEMCPY_DEVICE_TO_HOST": 2,
        "ACL_MEMCPY_DEVICE_TO_DEVICE": 3,
        "ACL_MEM_MALLOC_HUGE_FIRST": 0,
        "ACL_DDR_MEM": 0,
        "ACL_HBM_MEM": 1,
        "ACL_MEM_LOCATION_TYPE_HOST": 0,
        "ACL_MEM_LOCATION_TYPE_DEVICE": 1,
        "ACL_HOST_REGISTER_MAPPED": 0,
        "ACL_HOST_REG_MAPPED": 0x2,
        "ACL_HOST_REG_PINNED": 0x10000000,
        "ACL_EVENT_SYNC": 0x1,
        "ACL_EVENT_CAPTURE_STREAM_PROGRESS": 0x2,
        "ACL_EVENT_RECORDED_STATUS_NOT_READY": 0,
        "ACL_EVENT_RECORDED_STATUS_COMPLETE": 1,
        "ACL_RT_IPC_MEM_EXPORT_FLAG_DEFAULT": 0,
        "ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION": 1,
        "ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS": 1,
        "ACL_RT_BINARY_LOAD_OPT_MAGIC": 2,
        "ACL_RT_BINARY_MAGIC_ELF_VECTOR_CORE": 0x41415246,
    },
    errors={
        "ACL_SUCCESS": 0,
        "ACL_ERROR_INVALID_PARAM": 100000,
        "ACL_ERROR_UNINITIALIZE": 100001,
        "ACL_ERROR_REPEAT_INITIALIZE": 100002,
        "ACL_ERROR_BAD_ALLOC": 200000,
        "ACL_ERROR_API_NOT_SUPPORT": 200001,
        "ACL_ERROR_INVALID_DEVICE": 200002,
        "ACL_ERROR_MEMORY_ADDRESS_UNALIGNED": 200003,
        "ACL_ERROR_FEATURE_UNSUPPORTED": 200006,
        "ACL_ERROR_STORAGE_OVER_LIMIT": 300000,
        "ACL_ERROR_INTERNAL_ERROR": 500000,
        "ACL_ERROR_DRV_FAILURE": 500004,
        "ACL_ERROR_RT_PARAM_INVALID": 107000,
        "ACL_ERROR_RT_INVALID_DEVICEID": 107001,
        "ACL_ERROR_RT_CONTEXT_NULL": 107002,
        "ACL_ERROR_RT_STREAM_CONTEXT": 107003,
        "ACL_ERROR_RT_ADDR_UNALIGNED": 107008,
        "ACL_ERROR_RT_INVALID_MEMORY_TYPE": 107016,
        "ACL_ERROR_RT_INVALID_HANDLE": 107017,
        "ACL_ERROR_RT_WAIT_TIMEOUT": 107019,
        "ACL_ERROR_RT_TASK_TIMEOUT": 107020,
        "ACL_ERROR_RT_DEVICE_TASK_ABORT": 107022,
        "ACL_ERROR_RT_STREAM_ABORT": 107023,
        "ACL_ERROR_RT_FEATURE_NOT_SUPPORT": 207000,
        "ACL_ERROR_RT_MEMORY_ALLOCATION": 207001,
        "ACL_ERROR_RT_NO_DEVICE": 207004,
        "ACL_ERROR_RT_RESOURCE_ALLOC_FAIL": 207005,
        "ACL_ERROR_RT_NO_PERMISSION": 207006,
        "ACL_ERROR_RT_NO_EVENT_RESOURCE": 207007,
        "ACL_ERROR_RT_NO_STREAM_RESOURCE": 207008,
        "ACL_ERROR_RT_OVER_LIMIT": 207012,
        "ACL_ERROR_RT_DEVICE_OOM": 207018,
        "ACL_ERROR_RT_INTERNAL_ERROR": 507000,
        "ACL_ERROR_RT_TS_ERROR": 507001,
        "ACL_ERROR_RT_LOST_HEARTBEAT": 507010,
        "ACL_ERROR_RT_SYS_DMA": 507013,
        "ACL_ERROR_RT_AICORE_TIMEOUT": 507014,
        "ACL_ERROR_RT_AICORE_EXCEPTION": 507015,
        "ACL_ERROR_RT_IPC_ERROR": 507022,
        "ACL_ERROR_RT_COPY_DATA": 507052,
        "ACL_ERROR_RT_DEVICE_MEM_ERROR": 507053,
        "ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR": 507054,
        "ACL_ERROR_RT_SUSPECT_DEVICE_MEM_ERROR": 507055,
        "ACL_ERROR_RT_LINK_ERROR": 507056,
        "ACL_ERROR_RT_SUSPECT_REMOTE_ERROR": 507057,
        "ACL_ERROR_RT_DRV_INTERNAL_ERROR": 507899,
        "ACL_ERROR_RT_SOCKET_CLOSE": 507901,
        "ACL_ERROR_HOST_MEMORY_ALREADY_REGISTERED": 507910,
        "ACL_ERROR_HOST_MEMORY_NOT_REGISTERED": 507911,
    },
)  # fmt: skip
