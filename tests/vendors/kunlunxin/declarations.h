// SPDX-License-Identifier: Apache-2.0
// What the XPU runtime's headers say of the functions that this package calls: names, types and numbers only,
// written down here because no package registry carries them. It stands in for the headers in the signature
// check; it is not them, and a mistake made here and in abi.py alike would not show.
//
// Sources:
//   [1] xpu/runtime.h of 2018 (a public copy): everything but [3] to [5].
//   [2] xpu/defs.h up to the third generation (a public copy): the enumerations.
//   [3] calls in PaddlePaddle's and InfiniLM's sources: xpu_memcpy_async, xpu_event_query.
//   [4] calls in FastDeploy's custom_ops/xpu_ops: xpu_ipc_get_memhandle(XPUIpcMemHandle *, void *),
//       xpu_ipc_open_memhandle(void **, XPUIpcMemHandle, 1), xpu_ipc_close_memhandle(void *). The handle's size and
//       the type of the flag are our reading; both functions of [3] and [4] are in the list of symbols of XRE 5.
//   [5] calls in Triton's backend for XPUs and in launchers beside it: xpu_strerror.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define XPU_CODE(n) (700 + (n))
enum {
  XPU_SUCCESS = 0,
  XPUERR_INVALID_DEVICE = XPU_CODE(1),
  XPUERR_UNINIT = XPU_CODE(2),
  XPUERR_NODEV = XPU_CODE(3),
  XPUERR_VERSION = XPU_CODE(4),
  XPUERR_NOMEM = XPU_CODE(5),
  XPUERR_NOCPUMEM = XPU_CODE(6),
  XPUERR_INVALID_PARAM = XPU_CODE(7),
  XPUERR_NOSUPPORT = XPU_CODE(12),
  XPUERR_ABNORMAL = XPU_CODE(13),
  XPUERR_KEXCEPTION = XPU_CODE(14),
  XPUERR_TIMEOUT = XPU_CODE(15),
  XPUERR_BUSY = XPU_CODE(16),
  XPUERR_USEAFCLOSE = XPU_CODE(17),
  XPUERR_UCECC = XPU_CODE(18),
  XPUERR_OVERHEAT = XPU_CODE(19),
  XPUERR_UNEXPECT = XPU_CODE(100),
  XPUERR_DEVRESET = XPU_CODE(101),
  XPUERR_HWEXCEPTION = XPU_CODE(102),
  XPUERR_PEERRESET = XPU_CODE(105),
  XPUERR_DMATIMEOUT = XPU_CODE(108),
  XPUERR_DMAABORT = XPU_CODE(109),
  XPUERR_PCIE = XPU_CODE(112),
  XPUERR_FAULT = XPU_CODE(113),
  XPUERR_HOSTMEM_ALREADY_REGISTERED = XPU_CODE(116)
};

typedef enum { XPUATTR_PCI_ADDRESS = 0, XPUATTR_MODEL = 4 } XPUDeviceAttr;
typedef enum { XPU_MEM_MAIN = 0, XPU_MEM_L3 = 1, XPU_MEM_MMAPPABLE = 16 } XPUMemoryKind;
typedef enum { XPU_DEVICE_TO_HOST = 0, XPU_HOST_TO_DEVICE = 1, XPU_DEVICE_TO_DEVICE = 2 } XPUMemcpyKind;

typedef void* XPUStream;
typedef void* XPUEvent;
typedef void* XPUFunc;
typedef struct {
  char reserved[256];
} XPUIpcMemHandle;

const char* xpu_strerror(int);
int xpu_device_count(int*);
int xpu_set_device(int);
int xpu_device_get_attr(uint64_t*, XPUDeviceAttr, int);
int xpu_malloc(void**, uint64_t, XPUMemoryKind);
int xpu_free(void*);
int xpu_host_alloc(void**, uint64_t, unsigned int);
int xpu_host_free(void*);
int xpu_host_register(void*, uint64_t, unsigned int);
int xpu_host_unregister(void*);
int xpu_memcpy_async(void*, const void*, uint64_t, XPUMemcpyKind, XPUStream);
int xpu_memcpy_peer(int, void*, int, const void*, uint64_t);
int xpu_stream_create(XPUStream*);
int xpu_stream_destroy(XPUStream);
int xpu_stream_wait_event(XPUStream, XPUEvent);
int xpu_wait(XPUStream);
int xpu_event_create(XPUEvent*);
int xpu_event_destroy(XPUEvent);
int xpu_event_record(XPUEvent, XPUStream);
int xpu_event_query(XPUEvent);
int xpu_event_wait(XPUEvent);
int xpu_ipc_get_memhandle(XPUIpcMemHandle*, void*);
int xpu_ipc_open_memhandle(void**, XPUIpcMemHandle, unsigned int);
int xpu_ipc_close_memhandle(void*);
int xpu_create_cl_func(XPUFunc*, uint64_t, uint32_t, uint32_t, uint32_t, uint64_t, const char*, bool);
int xpu_launch_argument_set(const void*, size_t, size_t);
int xpu_launch_config(int, int, XPUStream);
int xpu_launch_async(XPUFunc);

#ifdef __cplusplus
}
#endif
