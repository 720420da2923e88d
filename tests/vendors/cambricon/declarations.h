// SPDX-License-Identifier: Apache-2.0
// What CNRT's and CNDrv's headers say of the functions that this package calls: names, types and numbers only, written
// down here because no package registry carries cnrt.h and cn_api.h. It stands in for the headers in the signature
// check; it is not them, and a mistake made here and in abi.py alike would not show.
//
// Sources:
//   [1] cnrt.h of CNRT 6.0.2 (a public copy): everything but [2].
//   [2] cnrt.h of CNRT 6.14.1 (a public copy): cnrtMemcpyAsync_V2. cnrtMemcpyAsync_V3 from its example there and
//       from calls in Cambricon's torch_mlu, which pass the same parameters.
//   [3] cn_api.h of CNDrv 2.15.5 (a public copy): everything that begins with cn or CN, but not with cnrt or CNRT.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  cnrtSuccess = 0,
  cnrtErrorNotReady = 1,
  cnrtErrorInit = 100002,
  cnrtErrorNoDevice = 100004,
  cnrtErrorDeviceInvalid = 100005,
  cnrtErrorArgsInvalid = 100006,
  cnrtErrorSys = 100007,
  cnrtErrorSysNoMem = 100010,
  cnrtErrorInvalidResourceHandle = 100014,
  cnrtErrorIllegalState = 100015,
  cnrtErrorNotSupport = 100050,
  cnrtErrorOpsNotPermitted = 100051,
  cnrtErrorQueue = 100060,
  cnrtErrorNoMem = 100100,
  cnrtErrorDevice = 632006,
  cnrtErrorMemcpyDirectionInvalid = 632013,
  cnrtErrorBusy = 632014,
  cnrtErrorCndrvFuncCall = 632015,
  cnrtErrorNoCnrtContext = 632019,
  cnrtErrorCndrvFuncNotFound = 632020,
  cnrtErrorUnknown = 999991
} cnrtRet_t;

typedef enum {
  cnrtMemcpyHostToDev = 0,
  cnrtMemcpyDevToDev,
  cnrtMemcpyDevToHost,
  cnrtMemcpyHostToHost,
  cnrtMemcpyPeerToPeer,
  cnrtMemcpyNoDirection
} cnrtMemTransDir_t;

typedef enum { cnrtMemTypeUnregistered = 0, cnrtMemTypeHost, cnrtMemTypeDevice } cnrtMemType_t;
typedef enum { cnrtUvaNotSupport = -1, cnrtUvaUnknown = 0, cnrtUvaUnCached, cnrtUvaCached } cnrtUvaCacheMode_t;
typedef enum { CNRT_NOTIFIER_DEFAULT = 0, CNRT_NOTIFIER_DISABLE_TIMING = 2 } cnrtNotifierFlags_t;

typedef struct {
  cnrtMemType_t type;
  int device;
  size_t size;
  void* devicePointer;
  void* hostPointer;
  cnrtUvaCacheMode_t cacheMode;
  void* deviceBasePointer;
} cnrtPointerAttributes_t;

typedef struct CNqueue_st* cnrtQueue_t;
typedef struct CNnotifier_st* cnrtNotifier_t;
typedef void* cnrtIpcMemHandle;

const char* cnrtGetErrorStr(cnrtRet_t);
cnrtRet_t cnrtGetLastError(void);
cnrtRet_t cnrtGetDeviceCount(unsigned int*);
cnrtRet_t cnrtSetDevice(int);
cnrtRet_t cnrtDeviceGetPCIBusId(char*, int, int);
cnrtRet_t cnrtMemGetInfo(size_t*, size_t*);
cnrtRet_t cnrtMalloc(void**, size_t);
cnrtRet_t cnrtFree(void*);
cnrtRet_t cnrtHostMalloc(void**, size_t);
cnrtRet_t cnrtFreeHost(void*);
cnrtRet_t cnrtPointerGetAttributes(cnrtPointerAttributes_t*, const void*);
cnrtRet_t cnrtMemcpyAsync(void*, void*, size_t, cnrtQueue_t, cnrtMemTransDir_t);
cnrtRet_t cnrtMemcpyAsync_V2(void*, void*, size_t, cnrtQueue_t, cnrtMemTransDir_t);
cnrtRet_t cnrtMemcpyAsync_V3(void*, void*, size_t, cnrtQueue_t, cnrtMemTransDir_t);
cnrtRet_t cnrtMemcpyPeerAsync(void*, int, void*, int, size_t, cnrtQueue_t);
cnrtRet_t cnrtGetPeerAccessibility(unsigned int*, int, int);
cnrtRet_t cnrtQueueCreate(cnrtQueue_t*);
cnrtRet_t cnrtQueueDestroy(cnrtQueue_t);
cnrtRet_t cnrtQueueSync(cnrtQueue_t);
cnrtRet_t cnrtQueueWaitNotifier(cnrtNotifier_t, cnrtQueue_t, unsigned int);
cnrtRet_t cnrtNotifierCreateWithFlags(cnrtNotifier_t*, unsigned int);
cnrtRet_t cnrtNotifierDestroy(cnrtNotifier_t);
cnrtRet_t cnrtPlaceNotifier(cnrtNotifier_t, cnrtQueue_t);
cnrtRet_t cnrtQueryNotifier(cnrtNotifier_t);
cnrtRet_t cnrtWaitNotifier(cnrtNotifier_t);
cnrtRet_t cnrtAcquireMemHandle(cnrtIpcMemHandle*, void*);
cnrtRet_t cnrtMapMemHandle(void**, cnrtIpcMemHandle, int);
cnrtRet_t cnrtUnMapMemHandle(void*);

typedef enum {
  CN_SUCCESS = 0,
  CN_INVOKE_ERROR_OUT_OF_RESOURCES = 100120,
  CN_INVOKE_ERROR_EXECUTED_TIMEOUT = 100121,
  CN_INVOKE_ERROR_TIMEOUT = 100122,
  CN_INVOKE_ERROR_ILLEGAL_INSTRUCTION = 100123,
  CN_INVOKE_ERROR_ADDRESS_SPACE = 100124,
  CN_INVOKE_ERROR_MEMORY_MISALIGNED_ADDRESS = 100130,
  CN_INVOKE_ERROR_MEMORY_ILLEGAL_ADDRESS = 100131,
  CN_INVOKE_ERROR = 100200,
  CN_CONTEXT_ERROR_INVALID = 100201,
  CN_ERROR_INVALID_FATBIN = 100300,
  CN_ERROR_NOT_FOUND = 100301,
  CN_ERROR_INVALID_KERNEL = 100302,
  CN_FATBIN_ERROR_UNSUPPORTED_VERSION = 100303,
  CN_FATBIN_ERROR_NO_KERNEL = 101312,
  CN_FATBIN_INVALID_IMAGE = 101313,
  CN_FATBIN_INVALID_ARCH = 101315,
  CN_ERROR_UNKNOWN = 200000
} CNresult;

typedef enum {
  CN_DEVICE_ATTRIBUTE_MLU_ISA_VERSION = 0x20a,
  CN_DEVICE_ATTRIBUTE_IS_MULTIPLE_TENSOR_PROCESSOR = 0x20b
} CNdevice_attribute;

typedef enum { CN_KERNEL_CLASS_BLOCK = 1, CN_KERNEL_CLASS_UNION = 4 } KernelClass;

typedef uint64_t CNdev;
typedef struct CNqueue_st* CNqueue;
typedef struct CNkernel_st* CNkernel;
typedef struct CNmodule_st* CNmodule;

CNresult cnDeviceGet(CNdev*, int);
CNresult cnDeviceGetAttribute(int*, CNdevice_attribute, CNdev);
CNresult cnModuleLoadFatBinary(const void*, CNmodule*);
CNresult cnModuleGetKernel(CNmodule, const char*, CNkernel*);
CNresult cnInvokeKernel(CNkernel, unsigned int, unsigned int, unsigned int, KernelClass, unsigned int, CNqueue, void**,
                        void**);

#ifdef __cplusplus
}
#endif
