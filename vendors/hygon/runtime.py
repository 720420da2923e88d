# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over HIP.

Written from HIP's headers; loads DTK's library on a node with DCUs. Never run on a DCU.
"""

from __future__ import annotations

import ctypes
import re

from sage_kv_connector.devices.runtime import (
    CopyKind,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceRuntime,
    DmaFailed,
    RuntimeFeatures,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.common.cuda_like import Call, Calls
from sage_kv_connector.vendors.common.kernels import KernelCalls, KernelRuntime
from sage_kv_connector.vendors.common.libraries import Library
from sage_kv_connector.vendors.hygon.abi import HIP, IPC_FLAGS, DeviceProperties, IpcHandle

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
    DmaFailed: frozenset({"hipErrorIllegalAddress", "hipErrorLaunchFailure", "hipErrorLaunchTimeOut"}),
    DeviceLost: frozenset(
        {"hipErrorECCNotCorrectable", "hipErrorContextIsDestroyed", "hipErrorDeinitialized", "hipErrorRuntimeOther"}
    ),
    UnsupportedByRuntime: frozenset({"hipErrorNotSupported", "hipErrorPeerAccessUnsupported"}),
}  # fmt: skip


CALLS = Calls(
    set_device="hipSetDevice",
    device_count="hipGetDeviceCount",
    device_name="hipDeviceGetName",
    device_bus="hipDeviceGetPCIBusId",
    memory_info="hipMemGetInfo",
    alloc=Call("hipMalloc"),
    free="hipFree",
    host_alloc=Call("hipHostMalloc", (CONSTANT["hipHostMallocPortable"],)),
    host_free="hipHostFree",
    host_register=Call("hipHostRegister", (CONSTANT["hipHostRegisterPortable"],)),
    host_unregister="hipHostUnregister",
    address_range="hipMemGetAddressRange",
    stream_create=Call("hipStreamCreateWithFlags", (CONSTANT["hipStreamNonBlocking"],)),
    stream_destroy="hipStreamDestroy",
    stream_synchronize="hipStreamSynchronize",
    stream_wait_event=Call("hipStreamWaitEvent", (0,)),
    copy="hipMemcpyAsync",
    copy_kinds=KINDS,
    copy_peer="hipMemcpyPeerAsync",
    can_access_peer="hipDeviceCanAccessPeer",
    enable_peer_access="hipDeviceEnablePeerAccess",
    peer_enabled="hipErrorPeerAccessAlreadyEnabled",
    event_create=Call(
        "hipEventCreateWithFlags", (CONSTANT["hipEventBlockingSync"] | CONSTANT["hipEventDisableTiming"],)
    ),
    event_destroy="hipEventDestroy",
    event_record="hipEventRecord",
    event_query="hipEventQuery",
    not_ready=("hipErrorNotReady",),
    event_synchronize="hipEventSynchronize",
    ipc_get="hipIpcGetMemHandle",
    ipc_open=Call("hipIpcOpenMemHandle"),
    ipc_close="hipIpcCloseMemHandle",
    ipc_handle=IpcHandle,
)


KERNEL_CALLS = KernelCalls("hipModuleLoadData", "hipModuleGetFunction", "hipModuleLaunchKernel")


class HygonRuntime(KernelRuntime):
    """DCUs through libgalaxyhip.so.5, or any HIP library. Batches came with HIP 7, which DTK is not."""

    interface = HIP
    kinds = ERROR_KINDS
    calls = CALLS
    kernel_calls = KERNEL_CALLS

    @property
    def features(self) -> RuntimeFeatures:
        return RuntimeFeatures(
            host_register=True,
            batched_copies=False,
            peer_copies=True,
            asynchronous_peer_copies=True,
            ipc=True,
            stages_peer_copies=True,
            kernels=True,
            # "mapped into the address space of all GPUs in the system", says hipHostMalloc's reference; the
            # address is the host's. Of registered memory HIP does not promise that.
            kernels_read_pinned=True,
            kernels_read_peers=True,
        )

    def _explain(self, status: int) -> str:
        text = self._c["hipGetErrorString"](status)
        return text.decode(errors="replace") if text else ""

    def _compiled_for(self, device: int) -> str:
        """Found by its form: where the properties have the name differs between versions of HIP.

        The name's own end ("gfx906:sramecc+:xnack-") may be left out of what kernels are compiled for.
        """
        properties = DeviceProperties()
        self._call("hipGetDeviceProperties", ctypes.byref(properties), device)
        found = re.search(rb"gfx[0-9a-f]{3,}", bytes(properties))
        if found is None:
            raise self._unsupported("hipGetDeviceProperties", f"it says no gfx name of device {device}")
        return found.group().decode()

    def ipc_import(self, device: int, handle: bytes) -> int:
        """The flag's value differs between versions: what one calls invalid is tried as the other's."""
        opened, address = self._opened_handle(handle), ctypes.c_void_p()
        with self._on(device):
            for flags in IPC_FLAGS:
                status = self._c["hipIpcOpenMemHandle"](ctypes.byref(address), opened, flags)
                if status != ERROR["hipErrorInvalidValue"]:
                    break
        if status != 0:
            raise self._error("hipIpcOpenMemHandle", status)
        return address.value or 0


def create(library: Library) -> DeviceRuntime:
    return HygonRuntime(library)
