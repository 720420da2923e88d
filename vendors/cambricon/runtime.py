# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over CNRT, and CNDrv for kernels.

Written from public copies of ``cnrt.h`` and ``cn_api.h`` and Cambricon's torch_mlu; never run on an MLU. What
CNRT does not have: pinning of existing host memory, batches, and codes of its own for misaligned
addresses and lost devices.
"""

from __future__ import annotations

import contextlib
import ctypes

from sage_kv_connector.devices.runtime import (
    CopyKind,
    DeviceError,
    DeviceInfo,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceRuntime,
    DmaFailed,
    Launch,
    RuntimeFeatures,
    RuntimeUnavailable,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.cambricon.abi import CNDRV, CNRT, IPC_HANDLE_BYTES, PointerAttributes
from sage_kv_connector.vendors.common.cuda_like import ENDS, Call, Calls, Column
from sage_kv_connector.vendors.common.kernels import KernelCalls, KernelRuntime
from sage_kv_connector.vendors.common.libraries import Library

INTERFACE = CNRT
CONSTANT = CNRT.constants
KINDS = {
    CopyKind.HOST_TO_DEVICE: CONSTANT["cnrtMemcpyHostToDev"],
    CopyKind.DEVICE_TO_HOST: CONSTANT["cnrtMemcpyDevToHost"],
    CopyKind.DEVICE_TO_DEVICE: CONSTANT["cnrtMemcpyDevToDev"],
}
NOT_READY = ("cnrtErrorNotReady", "cnrtErrorBusy")  #: the second until CNRT 6.0
#: The header says that cnrtQueueSync returns cnrtErrorQueue for earlier asynchronous work.
ERROR_KINDS: dict[type[DeviceError], frozenset[str]] = {
    DeviceOutOfMemory: frozenset({"cnrtErrorNoMem", "cnrtErrorSysNoMem"}),
    DmaFailed: frozenset(
        {"cnrtErrorQueue", "CN_INVOKE_ERROR", "CN_INVOKE_ERROR_EXECUTED_TIMEOUT",
         "CN_INVOKE_ERROR_ILLEGAL_INSTRUCTION", "CN_INVOKE_ERROR_ADDRESS_SPACE",
         "CN_INVOKE_ERROR_MEMORY_MISALIGNED_ADDRESS", "CN_INVOKE_ERROR_MEMORY_ILLEGAL_ADDRESS"}
    ),
    DeviceLost: frozenset({"cnrtErrorNoDevice"}),
    UnsupportedByRuntime: frozenset({"cnrtErrorNotSupport", "cnrtErrorCndrvFuncNotFound"}),
}  # fmt: skip


CALLS = Calls(
    set_device="cnrtSetDevice",
    device_count="cnrtGetDeviceCount",
    memory_info="cnrtMemGetInfo",
    alloc=Call("cnrtMalloc"),
    free="cnrtFree",
    host_alloc=Call("cnrtHostMalloc"),
    host_free="cnrtFreeHost",
    stream_create=Call("cnrtQueueCreate"),
    stream_destroy="cnrtQueueDestroy",
    stream_synchronize="cnrtQueueSync",
    stream_wait_event=Call("cnrtQueueWaitNotifier", (0,)),
    copy_kinds=KINDS,
    copy_peer="cnrtMemcpyPeerAsync",
    can_access_peer="cnrtGetPeerAccessibility",
    event_create=Call("cnrtNotifierCreateWithFlags", (CONSTANT["CNRT_NOTIFIER_DISABLE_TIMING"],)),
    event_destroy="cnrtNotifierDestroy",
    event_record="cnrtPlaceNotifier",
    event_query="cnrtQueryNotifier",
    not_ready=NOT_READY,
    event_synchronize="cnrtWaitNotifier",
    ipc_close="cnrtUnMapMemHandle",
)


KERNEL_CALLS = KernelCalls("cnModuleLoadFatBinary", "cnModuleGetKernel", "cnInvokeKernel")


class CambriconRuntime(KernelRuntime):
    """MLUs through libcnrt.so; their kernels through libcndrv.so."""

    interface = CNRT
    kinds = ERROR_KINDS
    calls = CALLS
    kernel_calls = KERNEL_CALLS
    count = ctypes.c_uint
    answer = ctypes.c_uint

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        copies = CNRT.one_of
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
            kernels=self._has(*CNDRV),
        )

    def _explain(self, status: int) -> str:
        text = self._c["cnrtGetErrorStr"](status)
        self._c["cnrtGetLastError"]()  # else the next caller of it in this thread would see our error
        return text.decode(errors="replace") if text else ""

    def device_info(self, device: int) -> DeviceInfo:
        """Without a name: ``cnrtDeviceProp_t`` differs between versions of CNRT."""
        total = self.memory_info(device)[1]
        bus = ctypes.create_string_buffer(64)
        if self._has("cnrtDeviceGetPCIBusId"):
            with contextlib.suppress(UnsupportedByRuntime):
                self._call("cnrtDeviceGetPCIBusId", bus, len(bus), device)
        return DeviceInfo(device, "", bus.value.decode(errors="replace").lower(), total)

    def free(self, device: int, address: int) -> None:
        super().free(device, address)
        with self._lock:
            self._exported.pop(address, None)

    @property
    def _tells_ranges(self) -> bool:
        return True

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        found = PointerAttributes()
        with self._on(device):
            self._call("cnrtPointerGetAttributes", ctypes.byref(found), address)
        if found.type != CONSTANT["cnrtMemTypeDevice"]:
            raise ValueError(f"{address:#x} is not device memory")
        return self._whole_range(found.deviceBasePointer or 0, found.size, address, nbytes)

    # Queues and copies

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        """CNRT names the notifier first."""
        super().stream_wait_event(device, event, stream)

    def _copy_call(self, kind: CopyKind, stream: int) -> tuple[str, tuple[Column | int, ...]]:
        return self._copy, (*ENDS, stream, KINDS[kind])

    def enable_peer_access(self, device: int, peer: int) -> None:
        """Needs no call: what CNRT says is reachable is reachable."""
        if device != peer and not self.can_access_peer(device, peer):
            raise self._unsupported("enable_peer_access", f"device {device} can't reach device {peer}")

    # Notifiers

    def event_query(self, device: int, event: int) -> bool:
        done = super().event_query(device, event)
        if not done:
            self._c["cnrtGetLastError"]()  # it counts as an error there
        return done

    # Kernels: what hands out a module or a kernel does so through its last argument

    def _compiled_for(self, device: int) -> str:
        handle, isa, clusters = ctypes.c_uint64(), ctypes.c_int(), ctypes.c_int()
        with self._on(device):
            self._call("cnDeviceGet", ctypes.byref(handle), device)
            for out, name in (
                (isa, "CN_DEVICE_ATTRIBUTE_MLU_ISA_VERSION"),
                (clusters, "CN_DEVICE_ATTRIBUTE_IS_MULTIPLE_TENSOR_PROCESSOR"),
            ):
                self._call("cnDeviceGetAttribute", ctypes.byref(out), CONSTANT[name], handle)
        return f"{'mtp' if clusters.value else 'tp'}_{isa.value}"

    def _load_module(self, code: bytes) -> int:
        return self._last_pointer(self.kernel_calls.load, code)

    def _find_kernel(self, module: int, name: bytes) -> int:
        return self._last_pointer(self.kernel_calls.function, module, name)

    def _launch_words(self, launch: Launch) -> tuple[int, ...]:
        """A block is a task on one core, which has one thread, and the memory that its kernel names."""
        _, blocks, threads, shared_bytes, _ = launch
        if threads != 1 or shared_bytes != 0:
            raise self._refused(launch, "a task of an MLU has 1 thread and 0 bytes")
        return (*blocks, 1, CONSTANT["CN_KERNEL_CLASS_BLOCK"], 0)

    # Other processes

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        """Any process that learns the handle can open it: CNRT names no importer.

        What was exported must stay allocated, or be freed through this object, which remembers the handle.
        """
        with self._lock:
            if base not in self._exported:
                handle = self._handle(device, Call("cnrtAcquireMemHandle"), base)
                self._exported[base] = handle.to_bytes(IPC_HANDLE_BYTES, "little")
            return self._exported[base]

    def ipc_import(self, device: int, handle: bytes) -> int:
        value = int.from_bytes(self._handle_of_length(handle, IPC_HANDLE_BYTES), "little")
        return self._handle(device, Call("cnrtMapMemHandle", (0,)), value)


def create(library: Library) -> DeviceRuntime:
    return CambriconRuntime(library)
