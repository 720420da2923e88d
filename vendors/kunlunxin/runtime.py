# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over Kunlunxin's own XPU runtime.

Written from public copies of its headers and from calls in PaddlePaddle and FastDeploy; never run on an
XPU. The runtime tells neither names, nor sizes of memory, nor which allocation holds an address, and
its copies between devices block.
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
from sage_kv_connector.vendors.kunlunxin.abi import XPU, IpcHandle
from sage_kv_connector.vendors.libraries import Library
from sage_kv_connector.vendors.vendor_runtime import VendorRuntime

INTERFACE = XPU
CONSTANT, ERROR = XPU.constants, XPU.errors
KINDS = {
    CopyKind.HOST_TO_DEVICE: CONSTANT["XPU_HOST_TO_DEVICE"],
    CopyKind.DEVICE_TO_HOST: CONSTANT["XPU_DEVICE_TO_HOST"],
    CopyKind.DEVICE_TO_DEVICE: CONSTANT["XPU_DEVICE_TO_DEVICE"],
}
#: FastDeploy opens handles with this flag; its name is not public.
IPC_OPEN_FLAG = 1
ERROR_KINDS: dict[type[DeviceError], frozenset[str]] = {
    DeviceOutOfMemory: frozenset({"XPUERR_NOMEM", "XPUERR_NOCPUMEM"}),
    DmaFailed: frozenset({"XPUERR_DMATIMEOUT", "XPUERR_DMAABORT", "XPUERR_FAULT"}),
    DeviceLost: frozenset(
        {"XPUERR_ABNORMAL", "XPUERR_UCECC", "XPUERR_OVERHEAT", "XPUERR_DEVRESET", "XPUERR_HWEXCEPTION",
         "XPUERR_PEERRESET", "XPUERR_PCIE"}
    ),
    UnsupportedByRuntime: frozenset({"XPUERR_NOSUPPORT"}),
}  # fmt: skip


class KunlunxinRuntime(VendorRuntime):
    """XPUs through libxpurt.so."""

    interface = XPU
    kinds = ERROR_KINDS

    @property
    def features(self) -> RuntimeFeatures:
        return RuntimeFeatures(
            host_register=True,
            batched_copies=False,
            peer_copies=True,
            asynchronous_peer_copies=False,
            ipc=self._has("xpu_ipc_get_memhandle", "xpu_ipc_open_memhandle", "xpu_ipc_close_memhandle"),
        )

    def _error(self, call: str, status: int) -> DeviceError:
        """Its functions and its driver do not agree on the sign of codes; ``xpu_strerror`` takes both."""
        return super()._error(call, abs(status))

    def _set(self, device: int) -> None:
        self._call("xpu_set_device", device)

    def _release(self, device: int, name: str, handle: int) -> None:
        with self._unless_lost():
            self._set(device)
            self._call(name, handle)

    # Devices

    def device_count(self) -> int:
        count = ctypes.c_int()
        self._call("xpu_device_count", ctypes.byref(count))
        return count.value

    def device_info(self, device: int) -> DeviceInfo:
        """The name is the model's number in the enumeration ``DeviceModel`` of ``xpu/defs.h``."""
        place, model = ctypes.c_uint64(), ctypes.c_uint64()
        self._call("xpu_device_get_attr", ctypes.byref(place), CONSTANT["XPUATTR_PCI_ADDRESS"], device)
        self._call("xpu_device_get_attr", ctypes.byref(model), CONSTANT["XPUATTR_MODEL"], device)
        bits = place.value  # domain [31:16], bus [15:8], device [7:3], function [2:0]
        bus = f"{bits >> 16 & 0xFFFF:04x}:{bits >> 8 & 0xFF:02x}:{bits >> 3 & 0x1F:02x}.{bits & 7}"
        return DeviceInfo(device, f"model {model.value}", bus, 0)

    def memory_info(self, device: int) -> tuple[int, int]:
        raise self._unsupported("memory_info", "the XPU runtime does not tell; xpu-smi does")

    # Memory

    def alloc(self, device: int, nbytes: int) -> int:
        self._set(device)
        return self._remember(self._pointer("xpu_malloc", nbytes, CONSTANT["XPU_MEM_MAIN"]), nbytes)

    def free(self, device: int, address: int) -> None:
        self._release(device, "xpu_free", address)
        self._forget(address)

    def host_alloc(self, device: int, nbytes: int) -> int:
        self._set(device)
        return self._pointer("xpu_host_alloc", nbytes, 0)

    def host_free(self, device: int, address: int) -> None:
        self._release(device, "xpu_host_free", address)

    def host_register(self, device: int, address: int, nbytes: int) -> None:
        self._set(device)
        self._call("xpu_host_register", address, nbytes, 0)

    def host_unregister(self, device: int, address: int) -> None:
        self._release(device, "xpu_host_unregister", address)

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        return self._own_allocation(address, nbytes)

    # Streams and copies

    def stream_create(self, device: int) -> int:
        self._set(device)
        return self._pointer("xpu_stream_create")

    def stream_destroy(self, device: int, stream: int) -> None:
        self._release(device, "xpu_stream_destroy", stream)

    def stream_synchronize(self, device: int, stream: int) -> None:
        self._set(device)
        self._call("xpu_wait", stream)

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        self._set(device)
        self._call("xpu_stream_wait_event", stream, event)

    def copy_async(
        self, device: int, destination: int, source: int, nbytes: int, kind: CopyKind, stream: int
    ) -> None:
        self._set(device)
        self._call("xpu_memcpy_async", destination, source, nbytes, KINDS[kind], stream)

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        self._set(device)
        for destination, source, nbytes in copies.tolist():
            self._call("xpu_memcpy_async", destination, source, nbytes, KINDS[kind], stream)

    def copy_peer_async(
        self,
        destination: int,
        destination_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        """Waits for the stream and then for the copy: ``xpu_memcpy_peer`` takes no stream."""
        self.stream_synchronize(destination_device, stream)
        self._call("xpu_memcpy_peer", destination_device, destination, source_device, source, nbytes)

    def can_access_peer(self, device: int, peer: int) -> bool:
        """The runtime has no question for this; a copy says it."""
        return device != peer

    def enable_peer_access(self, device: int, peer: int) -> None:
        """Needs no call."""

    # Events

    def event_create(self, device: int) -> int:
        self._set(device)
        return self._pointer("xpu_event_create")

    def event_destroy(self, device: int, event: int) -> None:
        self._release(device, "xpu_event_destroy", event)

    def event_record(self, device: int, event: int, stream: int) -> None:
        self._set(device)
        self._call("xpu_event_record", event, stream)

    def event_query(self, device: int, event: int) -> bool:
        """What it returns for work under way is not public: any code that names no failure counts as that."""
        self._set(device)
        if not self._has("xpu_event_query"):
            raise self._unsupported("xpu_event_query")
        status = abs(self._c["xpu_event_query"](event))
        failures = set(ERROR.values()) - {ERROR["XPUERR_BUSY"], ERROR["XPUERR_TIMEOUT"]}
        if status != 0 and status in failures:
            raise self._error("xpu_event_query", status)
        return bool(status == 0)

    def event_synchronize(self, device: int, event: int) -> None:
        self._set(device)
        self._call("xpu_event_wait", event)

    # Other processes

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        handle = IpcHandle()
        self._set(device)
        self._call("xpu_ipc_get_memhandle", ctypes.byref(handle), base)
        return bytes(handle)

    def ipc_import(self, device: int, handle: bytes) -> int:
        opened = IpcHandle.from_buffer_copy(self._handle_of_length(handle, ctypes.sizeof(IpcHandle)))
        self._set(device)
        return self._pointer("xpu_ipc_open_memhandle", opened, IPC_OPEN_FLAG)

    def ipc_close(self, device: int, base: int) -> None:
        self._release(device, "xpu_ipc_close_memhandle", base)


def create(library: Library) -> DeviceRuntime:
    return KunlunxinRuntime(library)
