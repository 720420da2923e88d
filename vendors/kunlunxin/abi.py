# SPDX-License-Identifier: Apache-2.0
"""What is used of the XPU runtime, Kunlunxin's own (XRE), not its CUDA-compatible one.

Source: ``xpu/runtime.h`` and ``xpu/defs.h`` of 2018–2023 as found in public copies; the list of functions of
the newer header in a public report on P800. ``xpu_memcpy_async``, ``xpu_event_query`` and ``xpu_ipc_*`` are in
that list, and their parameters are taken from calls in PaddlePaddle, FastDeploy and InfiniLM. How long a kernel's
argument may be: ``MAX_PARAM_DWORD_SIZE`` of the open driver of the first two generations.
No package registry carries the headers; see docs/vendors.md for what was checked.
"""

from __future__ import annotations

import ctypes

from sage_kv_connector.vendors.common.c_interface import CInterface

#: The size of ``XPUIpcMemHandle`` is not public. Callees read their own size from what is passed by value
#: (in memory, when larger than 16 bytes) or write it through a pointer, so a larger one fits any.
IPC_HANDLE_BYTES = 256


class IpcHandle(ctypes.Structure):
    """``XPUIpcMemHandle``."""

    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_BYTES),)


#: Functions that launch kernels.
KERNELS = ("xpu_create_cl_func", "xpu_launch_argument_set", "xpu_launch_config", "xpu_launch_async")

XPU = CInterface(
    vendor="kunlunxin",
    title="XPU runtime",
    sonames=("libxpurt.so.2", "libxpurt.so"),
    folders=("$XRE_PATH/so", "/usr/local/xpu/lib64"),
    types={
        "XPUStream": ctypes.c_void_p,
        "XPUEvent": ctypes.c_void_p,
        "XPUFunc": ctypes.c_void_p,
        "XPUDeviceAttr": ctypes.c_uint,
        "XPUMemoryKind": ctypes.c_uint,
        "XPUMemcpyKind": ctypes.c_uint,
        "XPUIpcMemHandle": IpcHandle,
    },
    declarations="""
        const char *xpu_strerror(int err);
        int xpu_device_count(int *dev_count);
        int xpu_set_device(int devid);
        int xpu_device_get_attr(uint64_t *v, XPUDeviceAttr attr, int devid);
        int xpu_malloc(void **pdevptr, uint64_t sz, XPUMemoryKind kind);
        int xpu_free(void *devptr);
        int xpu_host_alloc(void **ptr, uint64_t sz, unsigned int flags);
        int xpu_host_free(void *ptr);
        int xpu_host_register(void *ptr, uint64_t sz, unsigned int flags);
        int xpu_host_unregister(void *ptr);
        int xpu_memcpy_async(void *dst, const void *src, uint64_t sz, XPUMemcpyKind kind, XPUStream stream);
        int xpu_memcpy_peer(int dst_device, void *dst_addr, int src_device, const void *src_addr,
                            uint64_t sz);
        int xpu_stream_create(XPUStream *pstream);
        int xpu_stream_destroy(XPUStream stream);
        int xpu_stream_wait_event(XPUStream stream, XPUEvent event);
        int xpu_wait(XPUStream stream);
        int xpu_event_create(XPUEvent *pevent);
        int xpu_event_destroy(XPUEvent event);
        int xpu_event_record(XPUEvent event, XPUStream stream);
        int xpu_event_query(XPUEvent event);
        int xpu_event_wait(XPUEvent event);
        int xpu_ipc_get_memhandle(XPUIpcMemHandle *handle, void *devptr);
        int xpu_ipc_open_memhandle(void **devptr, XPUIpcMemHandle handle, unsigned int flags);
        int xpu_ipc_close_memhandle(void *devptr);
        int xpu_create_cl_func(XPUFunc *pfunc, uint64_t code_addr, uint32_t code_byte_size, uint32_t code_pc,
                               uint32_t param_dword_size, uint64_t hash, const char *name, bool on_xpu);
        int xpu_launch_argument_set(const void *arg, size_t size, size_t offset);
        int xpu_launch_config(int nclusters, int ncores, XPUStream stream);
        int xpu_launch_async(XPUFunc func);
    """,
    # XRE 4 (second generation) has no xpu_event_query and none of IPC.
    optional=frozenset(
        {
            "xpu_strerror",
            "xpu_event_query",
            "xpu_ipc_get_memhandle",
            "xpu_ipc_open_memhandle",
            "xpu_ipc_close_memhandle",
            *KERNELS,
        }
    ),
    constants={
        "XPUATTR_PCI_ADDRESS": 0,
        "XPUATTR_MODEL": 4,
        "XPU_MEM_MAIN": 0,
        "XPU_DEVICE_TO_HOST": 0,
        "XPU_HOST_TO_DEVICE": 1,
        "XPU_DEVICE_TO_DEVICE": 2,
    },
    errors={
        "XPU_SUCCESS": 0,
        "XPUERR_INVALID_DEVICE": 701,
        "XPUERR_UNINIT": 702,
        "XPUERR_NODEV": 703,
        "XPUERR_VERSION": 704,
        "XPUERR_NOMEM": 705,
        "XPUERR_NOCPUMEM": 706,
        "XPUERR_INVALID_PARAM": 707,
        "XPUERR_NOSUPPORT": 712,
        "XPUERR_ABNORMAL": 713,
        "XPUERR_KEXCEPTION": 714,
        "XPUERR_TIMEOUT": 715,
        "XPUERR_BUSY": 716,
        "XPUERR_USEAFCLOSE": 717,
        "XPUERR_UCECC": 718,
        "XPUERR_OVERHEAT": 719,
        "XPUERR_UNEXPECT": 800,
        "XPUERR_DEVRESET": 801,
        "XPUERR_HWEXCEPTION": 802,
        "XPUERR_PEERRESET": 805,
        "XPUERR_DMATIMEOUT": 808,
        "XPUERR_DMAABORT": 809,
        "XPUERR_PCIE": 812,
        "XPUERR_FAULT": 813,
        "XPUERR_HOSTMEM_ALREADY_REGISTERED": 816,
    },
)
