# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over the CUDA driver.

Contexts are the devices' primary ones, which PyTorch uses too. They are pushed for a call and
popped behind it, so a caller's own current device stays what it was.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import numpy as np

from sage_kv_connector.devices.runtime import (
    Copies,
    CopyKind,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceRuntime,
    DmaFailed,
    MisalignedAddress,
    RuntimeFeatures,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.common.cuda_like import ENDS, Call, Calls, Column
from sage_kv_connector.vendors.common.kernels import KernelCalls, KernelRuntime
from sage_kv_connector.vendors.common.libraries import Library
from sage_kv_connector.vendors.nvidia.abi import CUDA, CopyAttributes, IpcHandle

INTERFACE = CUDA
CONSTANT = CUDA.constants
COPIES = {
    CopyKind.HOST_TO_DEVICE: "cuMemcpyHtoDAsync",
    CopyKind.DEVICE_TO_HOST: "cuMemcpyDtoHAsync",
    CopyKind.DEVICE_TO_DEVICE: "cuMemcpyDtoDAsync",
}
ERROR_KINDS: dict[type[DeviceError], frozenset[str]] = {
    DeviceOutOfMemory: frozenset({"CUDA_ERROR_OUT_OF_MEMORY"}),
    MisalignedAddress: frozenset({"CUDA_ERROR_MISALIGNED_ADDRESS"}),
    DmaFailed: frozenset(
        {"CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_ILLEGAL_INSTRUCTION", "CUDA_ERROR_LAUNCH_FAILED",
         "CUDA_ERROR_LAUNCH_TIMEOUT", "CUDA_ERROR_NVLINK_UNCORRECTABLE"}
    ),
    DeviceLost: frozenset(
        {"CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_CONTEXT_IS_DESTROYED",
         "CUDA_ERROR_DEINITIALIZED", "CUDA_ERROR_EXTERNAL_DEVICE"}
    ),
    UnsupportedByRuntime: frozenset({"CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"}),
}  # fmt: skip


CALLS = Calls(
    device_count="cuDeviceGetCount",
    device_name="cuDeviceGetName",
    device_bus="cuDeviceGetPCIBusId",
    memory_info="cuMemGetInfo",
    alloc=Call("cuMemAlloc"),
    free="cuMemFree",
    host_alloc=Call("cuMemHostAlloc", (CONSTANT["CU_MEMHOSTALLOC_PORTABLE"],)),
    host_free="cuMemFreeHost",
    host_register=Call("cuMemHostRegister", (CONSTANT["CU_MEMHOSTREGISTER_PORTABLE"],)),
    host_unregister="cuMemHostUnregister",
    address_range="cuMemGetAddressRange",
    stream_create=Call("cuStreamCreate", (CONSTANT["CU_STREAM_NON_BLOCKING"],)),
    stream_destroy="cuStreamDestroy",
    stream_synchronize="cuStreamSynchronize",
    stream_wait_event=Call("cuStreamWaitEvent", (0,)),
    copy_peer="cuMemcpyPeerAsync",  # goes through the host, inside the driver, where they can't reach each other
    can_access_peer="cuDeviceCanAccessPeer",
    enable_peer_access="cuCtxEnablePeerAccess",
    peer_enabled="CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED",
    event_create=Call(
        "cuEventCreate", (CONSTANT["CU_EVENT_BLOCKING_SYNC"] | CONSTANT["CU_EVENT_DISABLE_TIMING"],)
    ),
    event_destroy="cuEventDestroy",
    event_record="cuEventRecord",
    event_query="cuEventQuery",
    not_ready=("CUDA_ERROR_NOT_READY",),
    event_synchronize="cuEventSynchronize",
    ipc_get="cuIpcGetMemHandle",
    ipc_open=Call("cuIpcOpenMemHandle", (CONSTANT["CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS"],)),
    ipc_close="cuIpcCloseMemHandle",
    ipc_handle=IpcHandle,
)


KERNEL_CALLS = KernelCalls("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel")

#: The form of CUDA 13 and that of 12.8, which tells the copy that failed too.
BATCHES = ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync (older)")


class NvidiaRuntime(KernelRuntime):
    """GPUs through libcuda.so.1."""

    interface = CUDA
    kinds = ERROR_KINDS
    calls = CALLS
    kernel_calls = KERNEL_CALLS
    address = ctypes.c_ulonglong

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self._contexts: dict[int, int] = {}
        self._call("cuInit", 0)

    @property
    def features(self) -> RuntimeFeatures:
        return RuntimeFeatures(
            host_register=True,
            batched_copies=any(map(self._has, BATCHES)),
            peer_copies=True,
            asynchronous_peer_copies=True,
            ipc=True,
            stages_peer_copies=True,
            kernels=True,
            # "Unified Addressing" of the driver's manual: what cuMemHostAlloc returned has the host's
            # address in kernels too, on every device of a 64-bit process, whatever its flags.
            kernels_read_pinned=True,
            kernels_read_peers=True,
        )

    def _explain(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._c["cuGetErrorString"](status, ctypes.byref(text))
        return text.value.decode(errors="replace") if text.value else ""

    def _number(self, device: int) -> int:
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        return handle.value

    def _context(self, device: int) -> int:
        """The device's primary context; retained once and kept, as PyTorch keeps it."""
        with self._lock:
            if device not in self._contexts:
                self._contexts[device] = self._pointer("cuDevicePrimaryCtxRetain", self._number(device))
            return self._contexts[device]

    @contextlib.contextmanager
    def _on(self, device: int) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context(device))
        try:
            yield
        finally:
            self._c["cuCtxPopCurrent"](ctypes.byref(ctypes.c_void_p()))

    def _compiled_for(self, device: int) -> str:
        """The compute capability, as compilers name it."""
        part, number = ctypes.c_int(), self._number(device)
        name = "sm_"
        for digit in ("MAJOR", "MINOR"):
            attribute = CONSTANT[f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{digit}"]
            self._call("cuDeviceGetAttribute", ctypes.byref(part), attribute, number)
            name += str(part.value)
        return name

    # Streams and copies

    def _copy_call(self, kind: CopyKind, stream: int) -> tuple[str, tuple[Column | int, ...]]:
        return COPIES[kind], (*ENDS, stream)

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        if len(copies) == 0:
            return
        call = next(filter(self._has, BATCHES), None)
        if call is None:
            super().copy_batch_async(device, copies, kind, stream)
            return
        with self._on(device):
            columns = np.ascontiguousarray(copies.T)  # uint64, as CUdeviceptr and size_t are
            addresses = ctypes.POINTER(ctypes.c_ulonglong)
            attributes = CopyAttributes(srcAccessOrder=CONSTANT["CU_MEMCPY_SRC_ACCESS_ORDER_STREAM"])
            failed = ctypes.c_size_t()
            self._call(
                call,
                columns[0].ctypes.data_as(addresses), columns[1].ctypes.data_as(addresses),
                columns[2].ctypes.data_as(ctypes.POINTER(ctypes.c_size_t)), len(copies),
                ctypes.byref(attributes), ctypes.byref(ctypes.c_size_t(0)), 1,
                *((ctypes.byref(failed),) if call == BATCHES[1] else ()), stream,
            )  # fmt: skip

    def _peer(self, device: int) -> int:
        return self._context(device)


def create(library: Library) -> DeviceRuntime:
    return NvidiaRuntime(library)
