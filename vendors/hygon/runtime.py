# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over HIP.

Written from HIP's headers; loads DTK's library on a node with DCUs. Never run on a DCU.
"""

from __future__ import annotations

import ctypes

from sage_kv_connector.devices.runtime import (
    Copies,
    CopyKind,
    DeviceError,
    DeviceInfo,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceRuntime,
    DmaFailed,
    RuntimeFeatures,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.hygon.abi import HIP, IPC_FLAGS, IpcHandle
from sage_kv_connector.vendors.libraries import Library
from sage_kv_connector.vendors.vendor_runtime import VendorRuntime

INTERFACE = HIP
CONSTANT, ERROR = HIP.constants, HIP.errors
KINDS = {
    CopyKind.HOST_TO_DEVICE: CONSTANT["hipMemcpyHostToDevice"],
    CopyKind.DEVICE_TO_HOST: CONSTANT["hipMemcpyDeviceToHost"],
    CopyKind.DEVICE_TO_DEVICE: CONSTANT["hipMemcpyDeviceToDevice"],
}
#: HIP has no code for a misaligned address.
ERROR_KINDS: dict[type[DeviceError], frozenset[str]] = {
    DeviceOutOfMemory: frozenset({"hipErrorOutOfMemory", "hipErrorRuntimeMemory"}),
    DmaFailed: frozenset({"hipErrorIllegalAddress", "hipErrorLaunchFailure"}),
    DeviceLost: frozenset(
        {"hipErrorECCNotCorrectable", "hipErrorContextIsDestroyed", "hipErrorDeinitialized", "hipErrorRuntimeOther"}
    ),
    UnsupportedByRuntime: frozenset({"hipErrorNotSupported", "hipErrorPeerAccessUnsupported"}),
}  # fmt: skip


class HygonRuntime(VendorRuntime):
    """DCUs through libgalaxyhip.so.5, or any HIP library."""

    interface = HIP
    kinds = ERROR_KINDS

    @property
    def features(self) -> RuntimeFeatures:
        return RuntimeFeatures(
            host_register=True,
            batched_copies=False,
            peer_copies=True,
            asynchronous_peer_copies=True,
            ipc=True,
        )

    def _explain(self, status: int) -> str:
        text = self._c["hipGetErrorString"](status)
        return text.decode(errors="replace") if text else ""

    def _set(self, device: int) -> None:
        self._call("hipSetDevice", device)

    def _release(self, device: int, name: str, handle: int) -> None:
        with self._unless_lost():
            self._set(device)
            self._call(name, handle)

    # Devices

    def device_count(self) -> int:
        count = ctypes.c_int()
        self._call("hipGetDeviceCount", ctypes.byref(count))
        return count.value

    def device_info(self, device: int) -> DeviceInfo:
        name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
        self._call("hipDeviceGetName", name, len(name), device)
        self._call("hipDeviceGetPCIBusId", bus, len(bus), device)
        total = self.memory_info(device)[1]
        return DeviceInfo(device, name.value.decode(errors="replace"), bus.value.decode().lower(), total)

    def memory_info(self, device: int) -> tuple[int, int]:
        self._set(device)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("hipMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # Memory

    def alloc(self, device: int, nbytes: int) -> int:
        self._set(device)
        return self._pointer("hipMalloc", nbytes)

    def free(self, device: int, address: int) -> None:
        self._release(device, "hipFree", address)

    def host_alloc(self, device: int, nbytes: int) -> int:
        self._set(device)
        return self._pointer("hipHostMalloc", nbytes, CONSTANT["hipHostMallocPortable"])

    def host_free(self, device: int, address: int) -> None:
        self._release(device, "hipHostFree", address)

    def host_register(self, device: int, address: int, nbytes: int) -> None:
        self._set(device)
        self._call("hipHostRegister", address, nbytes, CONSTANT["hipHostRegisterPortable"])

    def host_unregister(self, device: int, address: int) -> None:
        self._release(device, "hipHostUnregister", address)

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        self._set(device)
        base, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._call("hipMemGetAddressRange", ctypes.byref(base), ctypes.byref(size), address)
        return self._whole_range(base.value or 0, size.value, address, nbytes)

    # Streams and copies

    def stream_create(self, device: int) -> int:
        self._set(device)
        return self._pointer("hipStreamCreateWithFlags", CONSTANT["hipStreamNonBlocking"])

    def stream_destroy(self, device: int, stream: int) -> None:
        self._release(device, "hipStreamDestroy", stream)

    def stream_synchronize(self, device: int, stream: int) -> None:
        self._set(device)
        self._call("hipStreamSynchronize", stream)

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        self._set(device)
        self._call("hipStreamWaitEvent", stream, event, 0)

    def copy_async(
        self, device: int, destination: int, source: int, nbytes: int, kind: CopyKind, stream: int
    ) -> None:
        self._set(device)
        self._call("hipMemcpyAsync", destination, source, nbytes, KINDS[kind], stream)

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        """One by one: batches came with HIP 7, which DTK is not."""
        self._set(device)
        for destination, source, nbytes in copies.tolist():
            self._call("hipMemcpyAsync", destination, source, nbytes, KINDS[kind], stream)

    def copy_peer_async(
        self,
        destination: int,
        destination_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        self._set(destination_device)
        self._call(
            "hipMemcpyPeerAsync", destination, destination_device, source, source_device, nbytes, stream
        )

    def can_access_peer(self, device: int, peer: int) -> bool:
        answer = ctypes.c_int()
        self._call("hipDeviceCanAccessPeer", ctypes.byref(answer), device, peer)
        return bool(answer.value)

    def enable_peer_access(self, device: int, peer: int) -> None:
        self._set(device)
        status = self._c["hipDeviceEnablePeerAccess"](peer, 0)
        if status not in (0, ERROR["hipErrorPeerAccessAlreadyEnabled"]):
            raise self._error("hipDeviceEnablePeerAccess", status)

    # Events

    def event_create(self, device: int) -> int:
        self._set(device)
        flags = CONSTANT["hipEventBlockingSync"] | CONSTANT["hipEventDisableTiming"]
        return self._pointer("hipEventCreateWithFlags", flags)

    def event_destroy(self, device: int, event: int) -> None:
        self._release(device, "hipEventDestroy", event)

    def event_record(self, device: int, event: int, stream: int) -> None:
        self._set(device)
        self._call("hipEventRecord", event, stream)

    def event_query(self, device: int, event: int) -> bool:
        self._set(device)
        status = self._c["hipEventQuery"](event)
        if status not in (0, ERROR["hipErrorNotReady"]):
            raise self._error("hipEventQuery", status)
        return bool(status == 0)

    def event_synchronize(self, device: int, event: int) -> None:
        self._set(device)
        self._call("hipEventSynchronize", event)

    # Other processes

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        """Any process of this user on this node can open the handle: HIP names no importer."""
        handle = IpcHandle()
        self._set(device)
        self._call("hipIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle)

    def ipc_import(self, device: int, handle: bytes) -> int:
        opened = IpcHandle.from_buffer_copy(self._handle_of_length(handle, ctypes.sizeof(IpcHandle)))
        self._set(device)
        address = ctypes.c_void_p()
        for flags in IPC_FLAGS:
            status = self._c["hipIpcOpenMemHandle"](ctypes.byref(address), opened, flags)
            if status != ERROR["hipErrorInvalidValue"]:
                break
        if status != 0:
            raise self._error("hipIpcOpenMemHandle", status)
        return address.value or 0

    def ipc_close(self, device: int, base: int) -> None:
        self._release(device, "hipIpcCloseMemHandle", base)


def create(library: Library) -> DeviceRuntime:
    return HygonRuntime(library)
