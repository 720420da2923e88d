// SPDX-License-Identifier: Apache-2.0
// What CNRT's header says of the functions that this package calls: names, types and numbers only, written
// down here because no package registry carries cnrt.h. It stands in for the header in the signature check;
// it is not the header, and a mistake made here and in abi.py alike would not show.
//
// Sources:
//   [1] cnrt.h of CNRT 6.0.2 (a public copy): everything but [2].
//   [2] cnrt.h of CNRT 6.14.1 (a public copy): cnrtMemcpyAsync_V2. cnrtMemcpyAsync_V3 from its example there and
//       from calls in Cambricon's torch_mlu, which pass the same parameters.
#pragma once

#include <stddef.h>

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

#ifdef __cplusplus
}
#endif
