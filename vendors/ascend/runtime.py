# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over ACL.

Written from the ACL headers (see ``abi.py``) and CANN's API reference; never run on a card.
"""

from __future__ import annotations

import ctypes

import numpy as np

from sage_kv_connector.devices.runtime import (
    Copies,
    CopyKind,
    DeviceInfo,
    DeviceLost,
    DeviceOutOfMemory,
    DeviceRuntime,
    DmaFailed,
    Launch,
    MisalignedAddress,
    RuntimeFeatures,
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.ascend.abi import (
    ACL,
    IPC_KEY_BYTES,
    KERNELS,
    BatchAttributes,
    LoadOption,
    LoadOptions,
    PlaceHolder,
)
from sage_kv_connector.vendors.common.cuda_like import Call, Calls, Column
from sage_kv_connector.vendors.common.kernels import KernelCalls, KernelRuntime
from sage_kv_connector.vendors.common.libraries import Library

INTERFACE = ACL
CONSTANT = ACL.constants
KINDS = {
    CopyKind.HOST_TO_DEVICE: CONSTANT["ACL_MEMCPY_HOST_TO_DEVICE"],
    CopyKind.DEVICE_TO_HOST: CONSTANT["ACL_MEMCPY_DEVICE_TO_HOST"],
    CopyKind.DEVICE_TO_DEVICE: CONSTANT["ACL_MEMCPY_DEVICE_TO_DEVICE"],
}
ERROR_KINDS = {
    DeviceOutOfMemory: frozenset(
        {"ACL_ERROR_BAD_ALLOC", "ACL_ERROR_STORAGE_OVER_LIMIT",
         "ACL_ERROR_RT_MEMORY_ALLOCATION", "ACL_ERROR_RT_DEVICE_OOM"}
    ),
    MisalignedAddress: frozenset({"ACL_ERROR_MEMORY_ADDRESS_UNALIGNED", "ACL_ERROR_RT_ADDR_UNALIGNED"}),
    DmaFailed: frozenset(
        {"ACL_ERROR_RT_SYS_DMA", "ACL_ERROR_RT_COPY_DATA", "ACL_ERROR_RT_LINK_ERROR",
         "ACL_ERROR_RT_SUSPECT_REMOTE_ERROR", "ACL_ERROR_RT_TASK_TIMEOUT", "ACL_ERROR_RT_STREAM_ABORT"}
    ),
    DeviceLost: frozenset(
        {"ACL_ERROR_RT_LOST_HEARTBEAT", "ACL_ERROR_RT_SOCKET_CLOSE", "ACL_ERROR_RT_DEVICE_MEM_ERROR",
         "ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR", "ACL_ERROR_RT_DEVICE_TASK_ABORT"}
    ),
    UnsupportedByRuntime: frozenset(
        {"ACL_ERROR_API_NOT_SUPPORT", "ACL_ERROR_FEATURE_UNSUPPORTED", "ACL_ERROR_RT_FEATURE_NOT_SUPPORT"}
    ),
}  # fmt: skip


CALLS = Calls(
    set_device="aclrtSetDevice",
    device_count="aclrtGetDeviceCount",
    alloc=Call("aclrtMalloc", (CONSTANT["ACL_MEM_MALLOC_HUGE_FIRST"],)),
    free="aclrtFree",
    host_alloc=Call("aclrtMallocHost"),
    host_free="aclrtFreeHost",
    host_unregister="aclrtHostUnregister",
    address_range="aclrtMemGetAddressRange",
    stream_create=Call("aclrtCreateStream"),
    stream_destroy="aclrtDestroyStream",
    stream_synchronize="aclrtSynchronizeStream",
    stream_wait_event=Call("aclrtStreamWaitEvent"),
    can_access_peer="aclrtDeviceCanAccessPeer",
    enable_peer_access="aclrtDeviceEnablePeerAccess",
    event_create=Call("aclrtCreateEvent"),
    event_destroy="aclrtDestroyEvent",
    event_record="aclrtRecordEvent",
    event_synchronize="aclrtSynchronizeEvent",
)


#: Names of chips by what ccec compiles for their vector cores. Older ones have no bf16.
ARCHITECTURES = {"dav-c220-vec": ("Ascend910B", "Ascend910_93")}
#: Where a kernel's data lies among its arguments, behind its address: units of the unified buffer.
DATA_OFFSET = 32


class AscendRuntime(KernelRuntime):
    """NPUs through libascendcl.so."""

    interface = ACL
    kinds = ERROR_KINDS
    calls = CALLS
    kernel_calls = KernelCalls(*KERNELS)
    count = ctypes.c_uint32
    answer = ctypes.c_int32

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self._exported: dict[int, bytes] = {}  # base → key; a second key of one base would leak the first
        self._imported: dict[int, bytes] = {}
        status = self._c["aclInit"](None)
        # torch_npu, or another runtime object, may have been first.
        if status not in (0, ACL.errors["ACL_ERROR_REPEAT_INITIALIZE"]):
            raise self._error("aclInit", status)

    @property
    def features(self) -> RuntimeFeatures:
        return RuntimeFeatures(
            host_register=self._has("aclrtHostUnregister")
            and (self._has("aclrtHostRegisterV2") or self._has("aclrtHostRegister")),
            batched_copies=self._has("aclrtMemcpyBatchAsync"),
            peer_copies=True,
            asynchronous_peer_copies=True,
            ipc=self._has("aclrtIpcMemGetExportKey", "aclrtIpcMemSetImportPid", "aclrtIpcMemImportByKey"),
            kernels=self._has(*KERNELS),
            kernels_read_peers=True,
        )

    def _explain(self, status: int) -> str:
        function = self._c.get("aclGetRecentErrMsg")
        text = function() if function is not None else None
        return text.decode(errors="replace").strip() if text else ""

    def device_info(self, device: int) -> DeviceInfo:
        """ACL tells one name for all devices of a node, and no PCI address."""
        total = self.memory_info(device)[1]
        name = self._c["aclrtGetSocName"]()
        return DeviceInfo(device, name.decode(errors="replace") if name else "", "", total)

    def memory_info(self, device: int) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._on(device):
            for kind in ("ACL_HBM_MEM", "ACL_DDR_MEM"):  # inference cards such as the 310P have DDR only
                self._call("aclrtGetMemInfo", CONSTANT[kind], ctypes.byref(free), ctypes.byref(total))
                if total.value:
                    break
        return free.value, total.value

    # Memory

    def free(self, device: int, address: int) -> None:
        with self._unless_lost(), self._on(device):
            with self._lock:
                key = self._exported.get(address)
            if key is not None:
                self._call("aclrtIpcMemClose", key)
                with self._lock:
                    self._exported.pop(address, None)
            self._call("aclrtFree", address)
        self._forget(address)

    def host_register(self, device: int, address: int, nbytes: int) -> None:
        with self._on(device):
            if self._has("aclrtHostRegisterV2"):
                self._call("aclrtHostRegisterV2", address, nbytes, CONSTANT["ACL_HOST_REG_PINNED"])
                return
            kind, mapped = CONSTANT["ACL_HOST_REGISTER_MAPPED"], ctypes.c_void_p()
            self._call("aclrtHostRegister", address, nbytes, kind, ctypes.byref(mapped))

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        """ACL takes the address first."""
        if not self._tells_ranges:
            return self._own_allocation(address, nbytes)
        size, base = ctypes.c_size_t(), ctypes.c_void_p()
        with self._on(device):
            self._call("aclrtMemGetAddressRange", address, ctypes.byref(base), ctypes.byref(size))
        return self._whole_range(base.value or 0, size.value, address, nbytes)

    # Streams and copies

    def _copy_call(self, kind: CopyKind, stream: int) -> tuple[str, tuple[Column | int, ...]]:
        ends = Column.DESTINATION, Column.NBYTES, Column.SOURCE, Column.NBYTES
        return "aclrtMemcpyAsync", (*ends, KINDS[kind], stream)

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        if len(copies) == 0:
            return
        if not self._has("aclrtMemcpyBatchAsync"):
            return super().copy_batch_async(device, copies, kind, stream)
        columns = np.ascontiguousarray(copies.T)  # uint64, as void* and size_t are on every 64-bit host
        pointers = ctypes.POINTER(ctypes.c_void_p)
        sizes = columns[2].ctypes.data_as(ctypes.POINTER(ctypes.c_size_t))
        attributes = BatchAttributes()
        for location, is_host in (
            (attributes.dstLoc, kind == CopyKind.DEVICE_TO_HOST),
            (attributes.srcLoc, kind == CopyKind.HOST_TO_DEVICE),
        ):
            location.id = 0 if is_host else device
            location.type = CONSTANT[f"ACL_MEM_LOCATION_TYPE_{'HOST' if is_host else 'DEVICE'}"]
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t()
        with self._on(device):
            self._call(
            "aclrtMemcpyBatchAsync",
            columns[0].ctypes.data_as(pointers), sizes, columns[1].ctypes.data_as(pointers), sizes, len(copies),
            ctypes.byref(attributes), ctypes.byref(first), 1, ctypes.byref(failed), stream,
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
        """One address space for all devices of a process; needs ``enable_peer_access``."""
        kind = CopyKind.DEVICE_TO_DEVICE
        self.copy_async(destination_device, destination, source, nbytes, kind, stream)

    # Events

    def event_create(self, device: int) -> int:
        if not self._has("aclrtCreateEventExWithFlag"):
            return super().event_create(device)
        flags = CONSTANT["ACL_EVENT_SYNC"] | CONSTANT["ACL_EVENT_CAPTURE_STREAM_PROGRESS"]
        return self._handle(device, Call("aclrtCreateEventExWithFlag", (flags,)))

    def event_query(self, device: int, event: int) -> bool:
        status = ctypes.c_uint()
        with self._on(device):
            self._call("aclrtQueryEventStatus", event, ctypes.byref(status))
        return status.value == CONSTANT["ACL_EVENT_RECORDED_STATUS_COMPLETE"]

    # Kernels

    def _compiled_for(self, device: int) -> str:
        name = self.device_info(device).name
        for architecture, names in ARCHITECTURES.items():
            if name.startswith(names):
                return architecture
        raise self._unsupported("architecture", f"kernels are not for {name or 'a chip without a name'}")

    def _load_module(self, code: bytes) -> int:
        option = LoadOption(CONSTANT["ACL_RT_BINARY_LOAD_OPT_MAGIC"])
        option.value[0] = CONSTANT["ACL_RT_BINARY_MAGIC_ELF_VECTOR_CORE"]
        options = LoadOptions(ctypes.addressof(option), 1)
        return self._last_pointer(self.kernel_calls.load, code, len(code), ctypes.byref(options))

    def _find_kernel(self, module: int, name: bytes) -> int:
        return self._last_pointer(self.kernel_calls.function, module, name)

    def launch(self, device: int, launch: Launch, stream: int) -> None:
        """A block is a core's part. The kernel takes the address of its argument, which ACL copies to the device."""
        function, blocks, threads, shared_bytes, argument = launch
        if blocks[1] != 1 or threads != 1 or shared_bytes != 0:
            raise self._refused(
                launch, "cores of an NPU are in one row and have one thread, and a launch asks for 0 bytes"
            )
        given = ctypes.create_string_buffer(bytes(DATA_OFFSET) + argument, DATA_OFFSET + len(argument))
        where = PlaceHolder(0, DATA_OFFSET)
        words = (None, given, len(given), ctypes.byref(where), 1)
        with self._on(device):
            self._call(self.kernel_calls.launch, function, blocks[0], stream, *words)

    # Other processes

    def ipc_process_id(self, device: int) -> int:
        """The id outside of containers, by which the driver knows a process."""
        if not self._has("aclrtDeviceGetBareTgid"):
            return super().ipc_process_id(device)
        pid = ctypes.c_int32()
        with self._on(device):
            self._call("aclrtDeviceGetBareTgid", ctypes.byref(pid))
        return pid.value

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        """What was exported must stay allocated, or be freed through this object, which remembers the key."""
        with self._on(device):
            with self._lock:
                key = self._exported.get(base)
                if key is None:
                    buffer = ctypes.create_string_buffer(IPC_KEY_BYTES)
                    flags = CONSTANT["ACL_RT_IPC_MEM_EXPORT_FLAG_DEFAULT"]  # only named processes
                    self._call("aclrtIpcMemGetExportKey", base, nbytes, buffer, IPC_KEY_BYTES, flags)
                    key = self._exported[base] = buffer.raw
            self._call("aclrtIpcMemSetImportPid", key, ctypes.byref(ctypes.c_int32(importer_pid)), 1)
        return key

    def ipc_import(self, device: int, handle: bytes) -> int:
        key = self._handle_of_length(handle, IPC_KEY_BYTES)
        flags = CONSTANT["ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS"]
        base = self._handle(device, Call("aclrtIpcMemImportByKey", (flags,)), key)
        with self._lock:
            self._imported[base] = key
        return base

    def ipc_close(self, device: int, base: int) -> None:
        with self._lock:
            key = self._imported.pop(base, None)
        if key is None:
            raise ValueError(f"{base:#x} is not an address that ipc_import returned")
        self._release(device, "aclrtIpcMemClose", key)


def create(library: Library) -> DeviceRuntime:
    return AscendRuntime(library)
