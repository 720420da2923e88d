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
    DeviceInfo,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceRuntime,
    DmaFailed,
    MisalignedAddress,
    RuntimeFeatures,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.libraries import Library
from sage_kv_connector.vendors.nvidia.abi import CUDA, CopyAttributes, IpcHandle
from sage_kv_connector.vendors.vendor_runtime import VendorRuntime

INTERFACE = CUDA
CONSTANT, ERROR = CUDA.constants, CUDA.errors
COPIES = {
    CopyKind.HOST_TO_DEVICE: "cuMemcpyHtoDAsync",
    CopyKind.DEVICE_TO_HOST: "cuMemcpyDtoHAsync",
    CopyKind.DEVICE_TO_DEVICE: "cuMemcpyDtoDAsync",
}
ERROR_KINDS: dict[type[DeviceError], frozenset[str]] = {
    DeviceOutOfMemory: frozenset({"CUDA_ERROR_OUT_OF_MEMORY"}),
    MisalignedAddress: frozenset({"CUDA_ERROR_MISALIGNED_ADDRESS"}),
    DmaFailed: frozenset(
        {"CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED", "CUDA_ERROR_NVLINK_UNCORRECTABLE"}
    ),
    DeviceLost: frozenset(
        {"CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_CONTEXT_IS_DESTROYED",
         "CUDA_ERROR_DEINITIALIZED", "CUDA_ERROR_EXTERNAL_DEVICE"}
    ),
    UnsupportedByRuntime: frozenset({"CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"}),
}  # fmt: skip


class NvidiaRuntime(VendorRuntime):
    """GPUs through libcuda.so.1."""

    interface = CUDA
    kinds = ERROR_KINDS

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self._contexts: dict[int, int] = {}
        self._call("cuInit", 0)

    @property
    def features(self) -> RuntimeFeatures:
        return RuntimeFeatures(
            host_register=True,
            batched_copies=self._has("cuMemcpyBatchAsync"),
            peer_copies=True,
            asynchronous_peer_copies=True,
            ipc=True,
        )

    def _explain(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._c["cuGetErrorString"](status, ctypes.byref(text))
        return text.value.decode(errors="replace") if text.value else ""

    def _device(self, device: int) -> int:
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        return handle.value

    def _context(self, device: int) -> int:
        """The device's primary context; retained once and kept, as PyTorch keeps it."""
        with self._lock:
            if device not in self._contexts:
                self._contexts[device] = self._pointer("cuDevicePrimaryCtxRetain", self._device(device))
            return self._contexts[device]

    @contextlib.contextmanager
    def _on(self, device: int) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context(device))
        try:
            yield
        finally:
            self._c["cuCtxPopCurrent"](ctypes.byref(ctypes.c_void_p()))

    def _release(self, device: int, name: str, handle: int) -> None:
        with self._unless_lost(), self._on(device):
            self._call(name, handle)

    # Devices

    def device_count(self) -> int:
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def device_info(self, device: int) -> DeviceInfo:
        handle = self._device(device)
        name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
        self._call("cuDeviceGetName", name, len(name), handle)
        self._call("cuDeviceGetPCIBusId", bus, len(bus), handle)
        total = self.memory_info(device)[1]
        return DeviceInfo(device, name.value.decode(errors="replace"), bus.value.decode().lower(), total)

    def memory_info(self, device: int) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._on(device):
            self._call("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # Memory

    def alloc(self, device: int, nbytes: int) -> int:
        address = ctypes.c_ulonglong()
        with self._on(device):
            self._call("cuMemAlloc", ctypes.byref(address), nbytes)
        return address.value

    def free(self, device: int, address: int) -> None:
        self._release(device, "cuMemFree", address)

    def host_alloc(self, device: int, nbytes: int) -> int:
        with self._on(device):
            return self._pointer("cuMemHostAlloc", nbytes, CONSTANT["CU_MEMHOSTALLOC_PORTABLE"])

    def host_free(self, device: int, address: int) -> None:
        self._release(device, "cuMemFreeHost", address)

    def host_register(self, device: int, address: int, nbytes: int) -> None:
        with self._on(device):
            self._call("cuMemHostRegister", address, nbytes, CONSTANT["CU_MEMHOSTREGISTER_PORTABLE"])

    def host_unregister(self, device: int, address: int) -> None:
        self._release(device, "cuMemHostUnregister", address)

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        base, size = ctypes.c_ulonglong(), ctypes.c_size_t()
        with self._on(device):
            self._call("cuMemGetAddressRange", ctypes.byref(base), ctypes.byref(size), address)
        return self._whole_range(base.value, size.value, address, nbytes)

    # Streams and copies

    def stream_create(self, device: int) -> int:
        with self._on(device):
            return self._pointer("cuStreamCreate", CONSTANT["CU_STREAM_NON_BLOCKING"])

    def stream_destroy(self, device: int, stream: int) -> None:
        self._release(device, "cuStreamDestroy", stream)

    def stream_synchronize(self, device: int, stream: int) -> None:
        with self._on(device):
            self._call("cuStreamSynchronize", stream)

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        with self._on(device):
            self._call("cuStreamWaitEvent", stream, event, 0)

    def copy_async(
        self, device: int, destination: int, source: int, nbytes: int, kind: CopyKind, stream: int
    ) -> None:
        with self._on(device):
            self._call(COPIES[kind], destination, source, nbytes, stream)

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        if len(copies) == 0:
            return
        with self._on(device):
            if not self._has("cuMemcpyBatchAsync"):
                for destination, source, nbytes in copies.tolist():
                    self._call(COPIES[kind], destination, source, nbytes, stream)
                return
            columns = np.ascontiguousarray(copies.T)  # uint64, as CUdeviceptr and size_t are
            addresses = ctypes.POINTER(ctypes.c_ulonglong)
            attributes = CopyAttributes(srcAccessOrder=CONSTANT["CU_MEMCPY_SRC_ACCESS_ORDER_STREAM"])
            self._call(
                "cuMemcpyBatchAsync",
                columns[0].ctypes.data_as(addresses), columns[1].ctypes.data_as(addresses),
                columns[2].ctypes.data_as(ctypes.POINTER(ctypes.c_size_t)), len(copies),
                ctypes.byref(attributes), ctypes.byref(ctypes.c_size_t(0)), 1, stream,
            )  # fmt: skip

    def copy_peer_async(
        self,
        destination: int,
        destination_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        """Goes through the host, inside the driver, where the devices can't reach each other."""
        contexts = self._context(destination_device), self._context(source_device)
        with self._on(destination_device):
            self._call("cuMemcpyPeerAsync", destination, contexts[0], source, contexts[1], nbytes, stream)

    def can_access_peer(self, device: int, peer: int) -> bool:
        answer = ctypes.c_int()
        self._call("cuDeviceCanAccessPeer", ctypes.byref(answer), self._device(device), self._device(peer))
        return bool(answer.value)

    def enable_peer_access(self, device: int, peer: int) -> None:
        context = self._context(peer)
        with self._on(device):
            status = self._c["cuCtxEnablePeerAccess"](context, 0)
        if status not in (0, ERROR["CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"]):
            raise self._error("cuCtxEnablePeerAccess", status)

    # Events

    def event_create(self, device: int) -> int:
        flags = CONSTANT["CU_EVENT_BLOCKING_SYNC"] | CONSTANT["CU_EVENT_DISABLE_TIMING"]
        with self._on(device):
            return self._pointer("cuEventCreate", flags)

    def event_destroy(self, device: int, event: int) -> None:
        self._release(device, "cuEventDestroy", event)

    def event_record(self, device: int, event: int, stream: int) -> None:
        with self._on(device):
            self._call("cuEventRecord", event, stream)

    def event_query(self, device: int, event: int) -> bool:
        with self._on(device):
            status = self._c["cuEventQuery"](event)
        if status not in (0, ERROR["CUDA_ERROR_NOT_READY"]):
            raise self._error("cuEventQuery", status)
        return bool(status == 0)

    def event_synchronize(self, device: int, event: int) -> None:
        with self._on(device):
            self._call("cuEventSynchronize", event)

    # Other processes

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        """Any process of this user on this node can open the handle: CUDA names no importer."""
        handle = IpcHandle()
        with self._on(device):
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle)

    def ipc_import(self, device: int, handle: bytes) -> int:
        opened = IpcHandle.from_buffer_copy(self._handle_of_length(handle, ctypes.sizeof(IpcHandle)))
        address = ctypes.c_ulonglong()
        flags = CONSTANT["CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS"]
        with self._on(device):
            self._call("cuIpcOpenMemHandle", ctypes.byref(address), opened, flags)
        return address.value

    def ipc_close(self, device: int, base: int) -> None:
        self._release(device, "cuIpcCloseMemHandle", base)


def create(library: Library) -> DeviceRuntime:
    return NvidiaRuntime(library)
