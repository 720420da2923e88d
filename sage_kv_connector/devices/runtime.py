# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of a vendor's runtime: memory, asynchronous copies, kernels, streams, events, IPC.

Memory model
------------
A *device address* is an integer that only the runtime may dereference. Host memory takes
part in asynchronous copies at full speed when it is *pinned*: allocated by ``host_alloc``
or registered by ``host_register``. Addresses of imported memory (``ipc_import``) are device
addresses of this process.

Life of a copy
--------------
``copy_async`` and ``copy_batch_async`` only enqueue; copies of one stream run in order,
streams run beside one another. An event recorded behind a copy is over when the copy is:
``event_query`` asks, ``event_synchronize`` blocks without the GIL. Both ends of a copy must
stay as they are until then. A failed copy shows in the first ``event_query``,
``event_synchronize`` or ``stream_synchronize`` behind it, as a :class:`DeviceError`.

Life of a kernel
----------------
``load_function`` once a device, ``launch`` as often as wanted. A launch is work of a stream, in
order with its copies and events. It has one argument, a struct by value, which is copied before the
call returns; memory that the struct names must stay as it is until an event behind the launch is
over. A kernel that went wrong shows where a failed copy would.

Implementor's contract
----------------------
* One small file a vendor, ctypes over the vendor's C library, loaded at the first use and
  never at import; every status goes through one ``check`` that raises the named error.
* Methods may be called from any thread. A vendor's "current device" is a thread's own: each
  call that needs one sets it first.
* ``free``, ``host_free``, ``host_unregister``, ``ipc_close``, ``event_destroy`` and
  ``stream_destroy`` never raise for a device that is lost: what is gone need not be freed.
* What a vendor can't do raises :class:`UnsupportedByRuntime` and shows in ``features``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

#: uint64 array of shape (n, 3): destination address, source address, length in bytes.
Copies = npt.NDArray[np.uint64]
#: Of a kernel: function, blocks in x and y, threads of each, bytes of shared memory of each, argument.
Launch = tuple[int, tuple[int, int], int, int, bytes]


class CopyKind(IntEnum):
    """Where a copy goes; our own numbers, each runtime maps them to its vendor's."""

    HOST_TO_DEVICE = 1
    DEVICE_TO_HOST = 2
    DEVICE_TO_DEVICE = 3


class DeviceError(RuntimeError):
    """A vendor's call failed; ``call``, ``code`` and ``name`` are the vendor's own."""

    def __init__(self, vendor: str, call: str, code: int, name: str, detail: str = "") -> None:
        super().__init__(f"{vendor}: {call} failed with {code} ({name}){': ' + detail if detail else ''}")
        self.vendor, self.call, self.code, self.name, self.detail = vendor, call, code, name, detail


class DeviceOutOfMemory(DeviceError):
    """No room on the device (or for pinned host memory)."""


class MisalignedAddress(DeviceError):
    """An address or a length that the device's DMA can't take."""


class DmaFailed(DeviceError):
    """A copy or a kernel was started and did not end well."""


class DeviceLost(DeviceError):
    """The device does not answer any more; nothing on it can be used."""


class RuntimeUnavailable(RuntimeError):
    """The vendor's library is not here or can't be loaded; the text says what was tried."""


class UnsupportedByRuntime(DeviceError):
    """The vendor's runtime has no such call."""


class RuntimeFeatures(NamedTuple):
    """What a runtime can do; the layer above chooses its way by these alone."""

    host_register: bool  #: existing host memory can be pinned
    batched_copies: bool  #: one call for many copies
    peer_copies: bool  #: device to device of one node without the host
    asynchronous_peer_copies: bool  #: else ``copy_peer_async`` returns when stream and copy are over
    ipc: bool  #: device memory can be opened in another process
    memory_info: bool = True  #: it tells sizes of memory
    asks_peers: bool = True  #: ``can_access_peer`` knows; else only a copy says it
    stages_peer_copies: bool = (
        False  #: peers that don't reach each other are copied through the host, by itself
    )
    kernels: bool = False  #: modules can be loaded, and their kernels launched
    kernels_read_pinned: bool = False  #: kernels may use what ``host_alloc`` returned, at its own address
    kernels_read_peers: bool = False  #: kernels may read what ``ipc_import`` returned


class DeviceInfo(NamedTuple):
    """One device as its runtime names it."""

    device: int
    name: str
    pci_bus_id: str  #: "0000:c1:00.0", empty if the runtime does not tell
    memory_bytes: int  #: total, 0 if the runtime does not tell


class DeviceMemory(NamedTuple):
    """The accelerator that a KV cache lies on: ``number`` is the runtime's."""

    runtime: DeviceRuntime
    number: int


@runtime_checkable
class DeviceRuntime(Protocol):
    """One vendor's devices as seen from this process. See the module's text for the contract."""

    vendor: str  #: its name in ``vendors.vendor_names()``
    api: str  #: the vendor's name for it and the library that was loaded, for people
    emulated: bool  #: the library is an emulator over host memory; said wherever results are shown

    @property
    def features(self) -> RuntimeFeatures: ...

    def device_count(self) -> int: ...

    def device_info(self, device: int) -> DeviceInfo: ...

    def memory_info(self, device: int) -> tuple[int, int]:
        """Free and total bytes of a device."""
        ...

    def alloc(self, device: int, nbytes: int) -> int:
        """Device memory, aligned as the device's DMA wants it. Raises DeviceOutOfMemory."""
        ...

    def free(self, device: int, address: int) -> None: ...

    def host_alloc(self, device: int, nbytes: int) -> int:
        """Pinned host memory, page-aligned."""
        ...

    def host_free(self, device: int, address: int) -> None: ...

    def host_register(self, device: int, address: int, nbytes: int) -> None:
        """Pin existing host memory. Raises UnsupportedByRuntime."""
        ...

    def host_unregister(self, device: int, address: int) -> None: ...

    def stream_create(self, device: int) -> int: ...

    def stream_destroy(self, device: int, stream: int) -> None: ...

    def stream_synchronize(self, device: int, stream: int) -> None: ...

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        """Later work of ``stream`` waits for ``event``."""
        ...

    def copy_async(
        self, device: int, destination: int, source: int, nbytes: int, kind: CopyKind, stream: int
    ) -> None: ...

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        """Many copies of one kind; one call of the vendor's where ``features.batched_copies``."""
        ...

    def copy_peer_async(
        self,
        destination: int,
        destination_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        """Device to device of one node; the stream is the destination device's. Raises UnsupportedByRuntime."""
        ...

    def can_access_peer(self, device: int, peer: int) -> bool: ...

    def enable_peer_access(self, device: int, peer: int) -> None:
        """Let ``device`` read and write the memory of ``peer``. Idempotent."""
        ...

    def architecture(self, device: int) -> str:
        """What kernels for the device are compiled for: "sm_90", "gfx906", "host" on an emulator.

        Raises UnsupportedByRuntime.
        """
        ...

    def load_function(self, device: int, code: bytes, name: str) -> int:
        """A handle of the kernel ``name`` in the module image ``code``, for ``launch`` on this device.

        A module is loaded once a device for equal code, and stays until the process ends. Raises DeviceError with
        the vendor's name for an image or a name that is not there, UnsupportedByRuntime.
        """
        ...

    def launch(self, device: int, launch: Launch, stream: int) -> None:
        """Enqueue a kernel.

        The argument is the kernel's one struct, as long as the kernel declares it: nobody checks that. Of a long
        one a kernel gets the address where the vendor takes only short ones (see docs/vendors.md). Raises DeviceError,
        UnsupportedByRuntime.
        """
        ...

    def event_create(self, device: int) -> int: ...

    def event_destroy(self, device: int, event: int) -> None: ...

    def event_record(self, device: int, event: int, stream: int) -> None: ...

    def event_query(self, device: int, event: int) -> bool:
        """True when all work before the last record is over. Raises what a copy before it failed with."""
        ...

    def event_synchronize(self, device: int, event: int) -> None:
        """Block, without the GIL, until ``event_query`` would answer."""
        ...

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        """Base and length of the allocation that holds the range (what ``ipc_export`` takes)."""
        ...

    def ipc_process_id(self, device: int) -> int:
        """This process as an exporter has to name it; inside a container not always ``os.getpid()``."""
        ...

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        """A handle with which ``importer_pid`` can open the allocation. Raises UnsupportedByRuntime.

        The importer closes before the exporter frees. ``importer_pid`` is the importer's ``ipc_process_id``.
        """
        ...

    def ipc_import(self, device: int, handle: bytes) -> int:
        """Open another process's allocation; returns its base in this process.

        Raises ValueError for a handle of the wrong length (it came from a peer).
        """
        ...

    def ipc_close(self, device: int, base: int) -> None: ...
