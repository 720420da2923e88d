# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over CNRT.

Written from public copies of ``cnrt.h`` and Cambricon's torch_mlu; never run on an MLU. What CNRT
does not have: pinning of existing host memory, batches, and codes of its own for misaligned
addresses and lost devices.
"""

from __future__ import annotations

import contextlib
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
    RuntimeUnavailable,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.cambricon.abi import CNRT, IPC_HANDLE_BYTES, PointerAttributes
from sage_kv_connector.vendors.libraries import Library
from sage_kv_connector.vendors.vendor_runtime import VendorRuntime

INTERFACE = CNRT
CONSTANT, ERROR = CNRT.constants, CNRT.errors
KINDS = {
    CopyKind.HOST_TO_DEVICE: CONSTANT["cnrtMemcpyHostToDev"],
    CopyKind.DEVICE_TO_HOST: CONSTANT["cnrtMemcpyDevToHost"],
    CopyKind.DEVICE_TO_DEVICE: CONSTANT["cnrtMemcpyDevToDev"],
}
NOT_READY = (ERROR["cnrtErrorNotReady"], ERROR["cnrtErrorBusy"])  # the second until CNRT 6.0
#: The header says that cnrtQueueSync returns cnrtErrorQueue for earlier asynchronous work.
ERROR_KINDS: dict[type[DeviceError], frozenset[str]] = {
    DeviceOutOfMemory: frozenset({"cnrtErrorNoMem", "cnrtErrorSysNoMem"}),
    DmaFailed: frozenset({"cnrtErrorQueue"}),
    DeviceLost: frozenset({"cnrtErrorNoDevice"}),
    UnsupportedByRuntime: frozenset({"cnrtErrorNotSupport", "cnrtErrorCndrvFuncNotFound"}),
}


class CambriconRuntime(VendorRuntime):
    """MLUs through libcnrt.so."""

    interface = CNRT
    kinds = ERROR_KINDS

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        copies = ("cnrtMemcpyAsync_V3", "cnrtMemcpyAsync_V2", "cnrtMemcpyAsync")  # the same but for the name
        found = next(filter(self._has, copies), None)
        if found is None:
            raise RuntimeUnavailable(f"cambricon: {library.name} has none of {', '.join(copies)}")
        self._copy = found
        self._exported: dict[int, bytes] = {}  # cnrtAcquireMemHandle works once for an address

    @property
    def features(self) -> RuntimeFeatures:
        return RuntimeFeatures(
            host_register=False,
            batched_copies=False,
            peer_copies=True,
            asynchronous_peer_copies=True,
            ipc=True,
        )

    def _explain(self, status: int) -> str:
        text = self._c["cnrtGetErrorStr"](status)
        self._c["cnrtGetLastError"]()  # else the next caller of it in this thread would see our error
        return text.decode(errors="replace") if text else ""

    def _set(self, device: int) -> None:
        self._call("cnrtSetDevice", device)

    def _release(self, device: int, name: str, handle: int) -> None:
        with self._unless_lost():
            self._set(device)
            self._call(name, handle)

    # Devices

    def device_count(self) -> int:
        count = ctypes.c_uint()
        self._call("cnrtGetDeviceCount", ctypes.byref(count))
        return count.value

    def device_info(self, device: int) -> DeviceInfo:
        """Without a name: ``cnrtDeviceProp_t`` differs between versions of CNRT."""
        total = self.memory_info(device)[1]
        bus = ctypes.create_string_buffer(64)
        if self._has("cnrtDeviceGetPCIBusId"):
            with contextlib.suppress(UnsupportedByRuntime):
                self._call("cnrtDeviceGetPCIBusId", bus, len(bus), device)
        return DeviceInfo(device, "", bus.value.decode(errors="replace").lower(), total)

    def memory_info(self, device: int) -> tuple[int, int]:
        self._set(device)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cnrtMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # Memory

    def alloc(self, device: int, nbytes: int) -> int:
        self._set(device)
        return self._pointer("cnrtMalloc", nbytes)

    def free(self, device: int, address: int) -> None:
        self._release(device, "cnrtFree", address)
        with self._lock:
            self._exported.pop(address, None)

    def host_alloc(self, device: int, nbytes: int) -> int:
        self._set(device)
        return self._pointer("cnrtHostMalloc", nbytes)

    def host_free(self, device: int, address: int) -> None:
        self._release(device, "cnrtFreeHost", address)

    def host_register(self, device: int, address: int, nbytes: int) -> None:
        raise self._unsupported("host_register", "CNRT pins only what cnrtHostMalloc returns")

    def host_unregister(self, device: int, address: int) -> None:
        raise self._unsupported("host_unregister", "CNRT pins only what cnrtHostMalloc returns")

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        self._set(device)
        found = PointerAttributes()
        self._call("cnrtPointerGetAttributes", ctypes.byref(found), address)
        if found.type != CONSTANT["cnrtMemTypeDevice"]:
            raise ValueError(f"{address:#x} is not device memory")
        return self._whole_range(found.deviceBasePointer or 0, found.size, address, nbytes)

    # Queues and copies

    def stream_create(self, device: int) -> int:
        self._set(device)
        return self._pointer("cnrtQueueCreate")

    def stream_destroy(self, device: int, stream: int) -> None:
        self._release(device, "cnrtQueueDestroy", stream)

    def stream_synchronize(self, device: int, stream: int) -> None:
        self._set(device)
        self._call("cnrtQueueSync", stream)

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        self._set(device)
        self._call("cnrtQueueWaitNotifier", event, stream, 0)

    def copy_async(
        self, device: int, destination: int, source: int, nbytes: int, kind: CopyKind, stream: int
    ) -> None:
        self._set(device)
        self._call(self._copy, destination, source, nbytes, stream, KINDS[kind])

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        self._set(device)
        for destination, source, nbytes in copies.tolist():
            self._call(self._copy, destination, source, nbytes, stream, KINDS[kind])

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
            "cnrtMemcpyPeerAsync", destination, destination_device, source, source_device, nbytes, stream
        )

    def can_access_peer(self, device: int, peer: int) -> bool:
        answer = ctypes.c_uint()
        self._call("cnrtGetPeerAccessibility", ctypes.byref(answer), device, peer)
        return bool(answer.value)

    def enable_peer_access(self, device: int, peer: int) -> None:
        """Needs no call: what CNRT says is reachable is reachable."""
        if device != peer and not self.can_access_peer(device, peer):
            raise self._unsupported("enable_peer_access", f"device {device} can't reach device {peer}")

    # Notifiers

    def event_create(self, device: int) -> int:
        self._set(device)
        return self._pointer("cnrtNotifierCreateWithFlags", CONSTANT["CNRT_NOTIFIER_DISABLE_TIMING"])

    def event_destroy(self, device: int, event: int) -> None:
        self._release(device, "cnrtNotifierDestroy", event)

    def event_record(self, device: int, event: int, stream: int) -> None:
        self._set(device)
        self._call("cnrtPlaceNotifier", event, stream)

    def event_query(self, device: int, event: int) -> bool:
        self._set(device)
        status = self._c["cnrtQueryNotifier"](event)
        if status in NOT_READY:
            self._c["cnrtGetLastError"]()  # it counts as an error there
            return False
        if status != 0:
            raise self._error("cnrtQueryNotifier", status)
        return True

    def event_synchronize(self, device: int, event: int) -> None:
        self._set(device)
        self._call("cnrtWaitNotifier", event)

    # Other processes

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        """Any process that learns the handle can open it: CNRT names no importer.

        What was exported must stay allocated, or be freed through this object, which remembers the handle.
        """
        with self._lock:
            if base not in self._exported:
                self._set(device)
                handle = self._pointer("cnrtAcquireMemHandle", base)
                self._exported[base] = handle.to_bytes(IPC_HANDLE_BYTES, "little")
            return self._exported[base]

    def ipc_import(self, device: int, handle: bytes) -> int:
        value = int.from_bytes(self._handle_of_length(handle, IPC_HANDLE_BYTES), "little")
        self._set(device)
        return self._pointer("cnrtMapMemHandle", value, 0)

    def ipc_close(self, device: int, base: int) -> None:
        self._release(device, "cnrtUnMapMemHandle", base)


def create(library: Library) -> DeviceRuntime:
    return CambriconRuntime(library)
