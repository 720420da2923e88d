# SPDX-License-Identifier: Apache-2.0
"""``DeviceRuntime`` over a C library built like CUDA's: a table says which function does what.

Such a library has a current device a thread, returns a status from each call, hands addresses and handles out
through its first argument, and has streams and events. A vendor's runtime is its table (``Calls``), its kinds of
errors, and what it does in another way.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sage_kv_connector import _data_plane
from sage_kv_connector.devices.runtime import Copies, CopyKind, DeviceInfo
from sage_kv_connector.vendors.common.vendor_runtime import VendorRuntime


class Column(IntEnum):
    """An argument that each row of ``Copies`` has of its own."""

    DESTINATION = 0
    SOURCE = 1
    NBYTES = 2


ENDS = (Column.DESTINATION, Column.SOURCE, Column.NBYTES)


class Call(NamedTuple):
    """A function, and what stands behind its other arguments (flags)."""

    name: str
    tail: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Functions by what they do; the arguments before a call's ``tail`` stand beside it. "" where there is none."""

    set_device: str = ""  #: device
    device_count: str  #: out count
    device_name: str = ""  #: out text, its length, device
    device_bus: str = ""  #: out text, its length, device
    memory_info: str = ""  #: out free, out total
    alloc: Call  #: out address, bytes
    free: str
    host_alloc: Call  #: out address, bytes
    host_free: str
    host_register: Call | None = None  #: address, bytes
    host_unregister: str = ""
    address_range: str = ""  #: out base, out bytes, address
    stream_create: Call  #: out stream
    stream_destroy: str
    stream_synchronize: str
    stream_wait_event: Call  #: stream, event
    copy: str = ""  #: to, from, bytes, kind, stream
    copy_kinds: Mapping[CopyKind, int] = field(default_factory=dict)
    copy_peer: str = ""  #: to, its peer, from, its peer, bytes, stream
    can_access_peer: str = ""  #: out answer, device, peer
    enable_peer_access: str = ""  #: peer, 0
    peer_enabled: str = ""  #: the error that says that it was enabled before
    event_create: Call  #: out event
    event_destroy: str
    event_record: str  #: event, stream
    event_query: str = ""
    not_ready: tuple[str, ...] = ()  #: errors of ``event_query`` that say so
    event_synchronize: str
    ipc_get: str = ""  #: out handle, address
    ipc_open: Call | None = None  #: out address, handle
    ipc_close: str = ""
    ipc_handle: type[ctypes.Structure] | None = None


class CudaLikeRuntime(VendorRuntime):
    """A vendor's class gives ``interface``, ``kinds`` and ``calls``, and overrides what its library does otherwise.

    ``address``: the ctypes type through which device addresses come back. ``count`` and ``answer``:
    those of ``device_count`` and ``can_access_peer``.
    """

    calls: ClassVar[Calls]
    address: ClassVar[Any] = ctypes.c_void_p
    count: ClassVar[Any] = ctypes.c_int
    answer: ClassVar[Any] = ctypes.c_int

    @contextlib.contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """What is called inside concerns ``device``: it becomes the thread's current one, and stays it."""
        self._call(self.calls.set_device, device)
        yield

    def _release(self, device: int, name: str, handle: Any) -> None:
        """Give something back; what a lost device had is gone already."""
        with self._unless_lost(), self._on(device):
            self._call(name, handle)

    def _handle(self, device: int, call: Call, *arguments: Any) -> int:
        """What ``call`` hands out through its first argument."""
        with self._on(device):
            return self._pointer(call.name, *arguments, *call.tail)

    def _device_address(self, device: int, call: Call, *arguments: Any) -> int:
        """The same for an address of the device."""
        answer = self.address()
        with self._on(device):
            self._call(call.name, ctypes.byref(answer), *arguments, *call.tail)
        return answer.value or 0

    # Devices

    def device_count(self) -> int:
        count = self.count()
        self._call(self.calls.device_count, ctypes.byref(count))
        return int(count.value)

    def device_info(self, device: int) -> DeviceInfo:
        name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
        for call, text in ((self.calls.device_name, name), (self.calls.device_bus, bus)):
            if call:
                self._call(call, text, len(text), self._number(device))
        total = self.memory_info(device)[1]
        return DeviceInfo(device, name.value.decode(errors="replace"), bus.value.decode().lower(), total)

    def _number(self, device: int) -> int:
        """What the library's questions about a device call it."""
        return device

    def memory_info(self, device: int) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._on(device):
            self._call(self.calls.memory_info, ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # Memory

    def alloc(self, device: int, nbytes: int) -> int:
        address = self._device_address(device, self.calls.alloc, nbytes)
        return address if self._tells_ranges else self._remember(address, nbytes)

    def free(self, device: int, address: int) -> None:
        self._release(device, self.calls.free, address)
        self._forget(address)

    def host_alloc(self, device: int, nbytes: int) -> int:
        return self._handle(device, self.calls.host_alloc, nbytes)

    def host_free(self, device: int, address: int) -> None:
        self._release(device, self.calls.host_free, address)

    def host_register(self, device: int, address: int, nbytes: int) -> None:
        call = self.calls.host_register
        if call is None:
            raise self._unsupported("host_register", self._pins_only)
        with self._on(device):
            self._call(call.name, address, nbytes, *call.tail)

    @property
    def _pins_only(self) -> str:
        return f"{self.interface.title} pins only what {self.calls.host_alloc.name} returns"

    def host_unregister(self, device: int, address: int) -> None:
        if not self.calls.host_unregister:
            raise self._unsupported("host_unregister", self._pins_only)
        self._release(device, self.calls.host_unregister, address)

    @property
    def _tells_ranges(self) -> bool:
        """Whether the library says which allocation holds an address."""
        return self._has(self.calls.address_range)

    def allocation_of(self, device: int, address: int, nbytes: int) -> tuple[int, int]:
        if not self._tells_ranges:
            return self._own_allocation(address, nbytes)
        base, size = self.address(), ctypes.c_size_t()
        with self._on(device):
            self._call(self.calls.address_range, ctypes.byref(base), ctypes.byref(size), address)
        return self._whole_range(base.value or 0, size.value, address, nbytes)

    # Streams and copies

    def stream_create(self, device: int) -> int:
        return self._handle(device, self.calls.stream_create)

    def stream_destroy(self, device: int, stream: int) -> None:
        self._release(device, self.calls.stream_destroy, stream)

    def stream_synchronize(self, device: int, stream: int) -> None:
        with self._on(device):
            self._call(self.calls.stream_synchronize, stream)

    def stream_wait_event(self, device: int, stream: int, event: int) -> None:
        call = self.calls.stream_wait_event
        with self._on(device):
            self._call(call.name, stream, event, *call.tail)

    def _copy_call(self, kind: CopyKind, stream: int) -> tuple[str, tuple[Column | int, ...]]:
        """The function that puts one copy on a stream of the current device, and its arguments."""
        return self.calls.copy, (*ENDS, self.calls.copy_kinds[kind], stream)

    def copy_async(
        self, device: int, destination: int, source: int, nbytes: int, kind: CopyKind, stream: int
    ) -> None:
        name, words = self._copy_call(kind, stream)
        row = (destination, source, nbytes)
        with self._on(device):
            self._call(name, *(row[word] if isinstance(word, Column) else word for word in words))

    def copy_batch_async(self, device: int, copies: Copies, kind: CopyKind, stream: int) -> None:
        """One by one, by a loop without the interpreter: few of these libraries take batches."""
        name, words = self._copy_call(kind, stream)
        function = ctypes.cast(self._function(name), ctypes.c_void_p).value or 0
        given = [(int(word), 0) if isinstance(word, Column) else (-1, word) for word in words]
        with self._on(device):
            _, status = _data_plane.call_rows(function, np.ascontiguousarray(copies), given)
            self._check(name, status)

    def copy_peer_async(
        self,
        destination: int,
        destination_device: int,
        source: int,
        source_device: int,
        nbytes: int,
        stream: int,
    ) -> None:
        ends = (destination, self._peer(destination_device), source, self._peer(source_device))
        with self._on(destination_device):
            self._call(self.calls.copy_peer, *ends, nbytes, stream)

    def can_access_peer(self, device: int, peer: int) -> bool:
        answer = self.answer()
        self._call(self.calls.can_access_peer, ctypes.byref(answer), self._number(device), self._number(peer))
        return bool(answer.value)

    def enable_peer_access(self, device: int, peer: int) -> None:
        with self._on(device):
            status = self._c[self.calls.enable_peer_access](self._peer(peer), 0)
        if status not in (0, self.interface.errors.get(self.calls.peer_enabled)):
            raise self._error(self.calls.enable_peer_access, status)

    def _peer(self, device: int) -> int:
        """What copies between devices and ``enable_peer_access`` call a device."""
        return device

    # Events

    def event_create(self, device: int) -> int:
        return self._handle(device, self.calls.event_create)

    def event_destroy(self, device: int, event: int) -> None:
        self._release(device, self.calls.event_destroy, event)

    def event_record(self, device: int, event: int, stream: int) -> None:
        with self._on(device):
            self._call(self.calls.event_record, event, stream)

    def event_query(self, device: int, event: int) -> bool:
        with self._on(device):
            status = self._c[self.calls.event_query](event)
        if status not in (0, *(self.interface.errors[name] for name in self.calls.not_ready)):
            raise self._error(self.calls.event_query, status)
        return bool(status == 0)

    def event_synchronize(self, device: int, event: int) -> None:
        with self._on(device):
            self._call(self.calls.event_synchronize, event)

    # Other processes

    def ipc_export(self, device: int, base: int, nbytes: int, importer_pid: int) -> bytes:
        """Any process of this user on this node can open the handle: these libraries name no importer."""
        assert self.calls.ipc_handle is not None
        handle = self.calls.ipc_handle()
        with self._on(device):
            self._call(self.calls.ipc_get, ctypes.byref(handle), base)
        return bytes(handle)

    def ipc_import(self, device: int, handle: bytes) -> int:
        call = self.calls.ipc_open
        assert call is not None
        return self._device_address(device, call, self._opened_handle(handle))

    def _opened_handle(self, handle: bytes) -> ctypes.Structure:
        """A handle that came from a peer, or ValueError."""
        kind = self.calls.ipc_handle
        assert kind is not None
        return kind.from_buffer_copy(self._handle_of_length(handle, ctypes.sizeof(kind)))

    def ipc_close(self, device: int, base: int) -> None:
        self._release(device, self.calls.ipc_close, base)
