# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over Kunlunxin's own XPU runtime.

Written from public copies of its headers and from calls in PaddlePaddle and FastDeploy; never run on an
XPU. The runtime tells neither names, nor sizes of memory, nor which allocation holds an address, and
its copies between devices block.
"""

from __future__ import annotations

import ctypes
import io
import threading
import zipfile
import zlib

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
    UnsupportedByRuntime,
)
from sage_kv_connector.vendors.common.cuda_like import Call, Calls
from sage_kv_connector.vendors.common.kernels import KernelCalls, KernelRuntime
from sage_kv_connector.vendors.common.libraries import Library
from sage_kv_connector.vendors.kunlunxin.abi import KERNELS, XPU, IpcHandle
from sage_kv_connector.vendors.kunlunxin.arguments import ARGUMENT_BYTES, ArgumentRing

INTERFACE = XPU
CONSTANT, ERROR = XPU.constants, XPU.errors
KINDS = {
    CopyKind.HOST_TO_DEVICE: CONSTANT["XPU_HOST_TO_DEVICE"],
    CopyKind.DEVICE_TO_HOST: CONSTANT["XPU_DEVICE_TO_HOST"],
    CopyKind.DEVICE_TO_DEVICE: CONSTANT["XPU_DEVICE_TO_DEVICE"],
}
#: All but those that say that work is under way.
FAILURES = frozenset(ERROR.values()) - {ERROR["XPUERR_BUSY"], ERROR["XPUERR_TIMEOUT"]}
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


CALLS = Calls(
    set_device="xpu_set_device",
    device_count="xpu_device_count",
    alloc=Call("xpu_malloc", (CONSTANT["XPU_MEM_MAIN"],)),
    free="xpu_free",
    host_alloc=Call("xpu_host_alloc", (0,)),
    host_free="xpu_host_free",
    host_register=Call("xpu_host_register", (0,)),
    host_unregister="xpu_host_unregister",
    stream_create=Call("xpu_stream_create"),
    stream_destroy="xpu_stream_destroy",
    stream_synchronize="xpu_wait",
    stream_wait_event=Call("xpu_stream_wait_event"),
    copy="xpu_memcpy_async",
    copy_kinds=KINDS,
    event_create=Call("xpu_event_create"),
    event_destroy="xpu_event_destroy",
    event_record="xpu_event_record",
    event_synchronize="xpu_event_wait",
    ipc_get="xpu_ipc_get_memhandle",
    ipc_open=Call("xpu_ipc_open_memhandle", (IPC_OPEN_FLAG,)),
    ipc_close="xpu_ipc_close_memhandle",
    ipc_handle=IpcHandle,
)


KERNEL_CALLS = KernelCalls("", "xpu_create_cl_func", "xpu_launch_async")
#: Numbers of models by the generation that kernels are compiled for, as PaddlePaddle's Lite tells them apart.
GENERATIONS = {"xpu2": range(2, 300), "xpu3": range(300, 600)}


class KunlunxinRuntime(KernelRuntime):
    """XPUs through libxpurt.so."""

    interface = XPU
    kinds = ERROR_KINDS
    calls = CALLS
    kernel_calls = KERNEL_CALLS

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        # The runtime keeps the addresses of code and names, so what they point to stays.
        self._images: list[bytes] = []
        self._kernels: dict[tuple[int, bytes], tuple[int, bytes]] = {}
        self._rings: dict[int, ArgumentRing] = {}
        # Whether what is set of the next launch is a thread's own is not public.
        self._launching = threading.Lock()

    @property
    def features(self) -> RuntimeFeatures:
        return RuntimeFeatures(
            host_register=True,
            batched_copies=False,
            peer_copies=True,
            asynchronous_peer_copies=False,
            ipc=self._has("xpu_ipc_get_memhandle", "xpu_ipc_open_memhandle", "xpu_ipc_close_memhandle"),
            memory_info=False,
            asks_peers=False,
            kernels=self._has(*KERNELS),
        )

    def _error(self, call: str, status: int) -> DeviceError:
        """Its functions and its driver do not agree on the sign of codes; ``xpu_strerror`` takes both."""
        return super()._error(call, abs(status))

    def _explain(self, status: int) -> str:
        if not self._has("xpu_strerror"):
            return ""
        text = self._c["xpu_strerror"](status)
        return text.decode(errors="replace") if text else ""

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

    def event_query(self, device: int, event: int) -> bool:
        """What it returns for work under way is not public: any code that names no failure counts as that."""
        with self._on(device):
            if not self._has("xpu_event_query"):
                raise self._unsupported("xpu_event_query")
            status = abs(self._c["xpu_event_query"](event))
        if status != 0 and status in FAILURES:
            raise self._error("xpu_event_query", status)
        return bool(status == 0)

    # Kernels: there are no modules, but functions made of code; and three calls to a launch

    def _compiled_for(self, device: int) -> str:
        model = ctypes.c_uint64()
        self._call("xpu_device_get_attr", ctypes.byref(model), CONSTANT["XPUATTR_MODEL"], device)
        for generation, models in GENERATIONS.items():
            if model.value in models:
                return generation
        raise self._unsupported("architecture", f"kernels are not for model {model.value} of device {device}")

    def _load_module(self, code: bytes) -> int:
        """An image is the code of one function, or a zip of several by their names."""
        self._images.append(code)
        return len(self._images) - 1

    def _find_kernel(self, module: int, name: bytes) -> int:
        if (module, name) not in self._kernels:
            code = self._images[module]
            if zipfile.is_zipfile(io.BytesIO(code)):
                with zipfile.ZipFile(io.BytesIO(code)) as image:
                    if name.decode() not in image.namelist():
                        raise self._error("xpu_create_cl_func", ERROR["XPUERR_INVALID_PARAM"])
                    code = image.read(name.decode())
            address = ctypes.cast(ctypes.c_char_p(code), ctypes.c_void_p).value or 0
            words = (address, len(code), 0, 0, zlib.crc32(code), name, False)
            self._kernels[module, name] = self._pointer(self.kernel_calls.function, *words), code
        return self._kernels[module, name][0]

    def launch(self, device: int, launch: Launch, stream: int) -> None:
        """Blocks are clusters, threads their cores. A kernel of more than ``ARGUMENT_BYTES`` takes their address."""
        function, blocks, threads, shared_bytes, argument = launch
        if blocks[1] != 1 or shared_bytes != 0:
            raise self._refused(launch, "clusters of an XPU are in one row, and a launch asks for 0 bytes")
        with self._launching:
            if len(argument) <= ARGUMENT_BYTES:
                self._launch(device, function, (blocks[0], threads, stream), argument)
                return
            if device not in self._rings:
                self._rings[device] = ArgumentRing(self, device)
            with self._rings[device].placed(argument, stream) as address:
                self._launch(device, function, (blocks[0], threads, stream), address.to_bytes(8, "little"))

    def _launch(self, device: int, function: int, shape: tuple[int, int, int], argument: bytes) -> None:
        """The argument first: a launcher that runs on P800s says that kernels hang otherwise."""
        with self._on(device):
            self._call("xpu_launch_argument_set", argument, len(argument), 0)
            self._call("xpu_launch_config", *shape)
            self._call(self.kernel_calls.launch, function)


def create(library: Library) -> DeviceRuntime:
    return KunlunxinRuntime(library)
