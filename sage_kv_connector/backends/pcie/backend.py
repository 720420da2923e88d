# SPDX-License-Identifier: Apache-2.0
"""Same node, device to device: the receiver copies straight out of the sender's device memory, or reads it.

Host memory, control messages and everything about connections are shm's; this backend adds
windows and posts over device memory. A post names its bytes by IPC handles of the allocations
they lie in; the receiver opens each handle once a connection, lets its device copy into its own
pages (a DMA lane), and says when it is done. No byte passes the host, so there is nothing to
checksum: generations and revocation guard a transfer.

A connection is usable when both sides have the same vendor's runtime and each could open a
handle of the other; otherwise it ends while it is set up, and the layer above goes on to the
peer's next address.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import ClassVar, NamedTuple

from sage_kv_connector.backends.base import (
    BackendOptions,
    Capabilities,
    ConnectionInfo,
    Descriptors,
    Event,
    EventKind,
    Segments,
    Status,
    checked_table,
)
from sage_kv_connector.backends.device_backend import Read
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.greetings import Greetings
from sage_kv_connector.backends.pcie.host_half import HOST, HostHalf
from sage_kv_connector.backends.pcie.incoming import Incoming
from sage_kv_connector.backends.pcie.ipc_memory import IpcMemory
from sage_kv_connector.backends.pcie.moved_bytes import MovedBytes
from sage_kv_connector.backends.pcie.outgoing import Outgoing
from sage_kv_connector.backends.shm.backend import ShmBackend
from sage_kv_connector.devices.runtime import DeviceError, DeviceMemory

DEVICE = b"D"
#: More than the inner backend can have left when it was closed.
CLOSING_EVENTS = 1 << 20
#: Ids of device windows and posts are above any that shm gives.
FIRST_ID = 1 << 48


class _OnDevice(NamedTuple):
    """What there is once a device is attached."""

    memory: IpcMemory
    greetings: Greetings
    incoming: Incoming
    outgoing: Outgoing


class PcieBackend(HostHalf):
    """Made without a device; ``attach_device`` comes before ``listen`` and ``connect``."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "pcie", rank=10, crosses_nodes=False, device_memory=True, parts=True
    )

    def __init__(self, inner: ShmBackend) -> None:
        super().__init__(inner)
        self._lock = threading.RLock()
        self._ids = count(FIRST_ID)
        self._refused: dict[int, str] = {}
        self._moved = MovedBytes()
        self._events: deque[Event] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._epoll.register(inner.fileno(), select.EPOLLIN)
        self._attached: _OnDevice | None = None
        self._closed = False

    @classmethod
    def from_options(cls, options: BackendOptions) -> PcieBackend:
        return cls(ShmBackend.from_options(options))

    def attach_device(self, device: DeviceMemory) -> None:
        """The device whose memory moves. Raises DeviceError when it can't have a stream."""
        memory = IpcMemory(device)
        incoming = Incoming(memory, self._ids, self._report, self._tell, self._wake_up)
        outgoing = Outgoing(memory, self._ids, self._report, self._tell)
        self._attached = _OnDevice(memory, Greetings(memory, self._tell), incoming, outgoing)

    # -- memory

    def register_device_memory(self, address: int, length: int) -> None:
        """As ``register_memory``, for memory of the device, until ``close``."""
        self._device().memory.register(address, length)

    # -- connections

    def listen(self, address: str) -> str:
        bound = self._inner.listen(address.replace("pcie://", "shm://", 1))
        return f"pcie://{self._device().memory.vendor}@{bound.removeprefix('shm://')}"

    def connect(self, address: str, timeout_s: float) -> int:
        ours = self._device().memory.vendor
        if not address.startswith("pcie://"):
            raise ValueError(f"address {address!r} must start with pcie://")
        vendor, separator, name = address.removeprefix("pcie://").partition("@")
        if not separator or vendor != ours:
            raise ValueError(f"address {address!r}: {vendor or 'no vendor'} there, {ours} here")
        return self._inner.connect(f"shm://{name}", timeout_s)

    def connection_info(self, connection: int) -> ConnectionInfo:
        peer = self._inner.connection_info(connection).peer
        return ConnectionInfo(peer, "ipc", "", False, 1)

    def send(self, connection: int, message: bytes) -> None:
        self._inner.send(connection, pm.encode(pm.Upper(message)))

    # -- windows and posts

    def open_window(
        self, connection: int, segments: Segments, generation: int, *, notify_chunks: bool = False
    ) -> int:
        segments = checked_table(segments, "segments", 2)
        device = self._device()
        if not device.memory.covers(segments):
            return self._inner.open_window(connection, segments, generation, notify_chunks=notify_chunks)
        device.greetings.open_process(connection)
        return device.incoming.open_window(connection, segments, generation)

    def open_read_window(self, connection: int, nbytes: int, generation: int, read: Read) -> int:
        device = self._device()
        device.greetings.open_process(connection)
        return device.incoming.open_read_window(connection, nbytes, generation, read)

    def window_descriptor(self, window: int) -> bytes:
        if window < FIRST_ID:
            return HOST + self._inner.window_descriptor(window)
        return DEVICE + window.to_bytes(8, "little")

    def close_window(self, window: int) -> int:
        if window < FIRST_ID:
            return self._inner.close_window(window)
        return self._device().incoming.close_window(window)

    def post(
        self,
        connection: int,
        window_descriptor: bytes,
        descriptors: Descriptors,
        generation: int,
        *,
        priority: int = 0,
        checksum: bool = True,
    ) -> int:
        kind, where = window_descriptor[:1], window_descriptor[1:]
        if kind == HOST:
            return self._inner.post(
                connection, where, descriptors, generation, priority=priority, checksum=checksum
            )
        if kind != DEVICE or len(where) != 8:
            raise ValueError(
                f"window_descriptor has {len(window_descriptor)} bytes and is none of the pcie backend"
            )
        descriptors = checked_table(descriptors, "descriptors", 3)
        device = self._device()
        process = device.greetings.open_process(connection)
        window = int.from_bytes(where, "little")
        post, offers = device.outgoing.post(connection, process, window, descriptors, generation)
        for offered in offers:
            self._inner.send(connection, pm.encode(offered))
        return post

    def cancel(self, post: int) -> None:
        if post < FIRST_ID:
            self._inner.cancel(post)
        else:
            self._device().outgoing.cancel(post)

    # -- events

    def poll(self, max_events: int = 256) -> Sequence[Event]:
        if not self._closed:
            for event in self._inner.poll(max_events):
                self._from_inner(event)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            if self._attached is not None:
                self._attached.incoming.take_copied()
        with self._lock:
            out = [self._events.popleft() for _ in range(min(max_events, len(self._events)))]
            if self._events:
                self._wake_up()
        return out

    def wait(self, timeout_s: float) -> bool:
        with self._lock:
            if self._events:
                return True
            if self._closed:
                return False
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            return bool(self._epoll.poll(timeout_s, 1)) and not self._closed
        return False

    def fileno(self) -> int:
        return -1 if self._closed else self._epoll.fileno()

    def counters(self) -> dict[str, int]:
        found = self._inner.counters()
        if self._attached is None:
            return found | {"device_offers": 0}
        return found | self._attached.incoming.counters()

    def traffic(self) -> Sequence[tuple[int, int, int]]:
        return self._moved.add_to(self._inner.traffic())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._wake_up()  # whoever waits
        self._inner.close()
        for event in self._inner.poll(CLOSING_EVENTS):
            if event.kind in (
                EventKind.CLOSED,
                EventKind.SENT,
                EventKind.WINDOW_DONE,
                EventKind.WINDOW_FAILED,
            ):
                self._from_inner(event)
        if self._attached is not None:
            self._attached.incoming.close()
            self._attached.memory.close()
        self._epoll.close()
        os.close(self._wake)

    # -- inside: what the inner backend reports

    def _from_inner(self, event: Event) -> None:
        if event.kind == EventKind.CONNECTED:
            self._device().greetings.dialled(event.connection)
        elif event.kind == EventKind.ACCEPTED:
            pass  # the dialler greets
        elif event.kind == EventKind.CLOSED:
            self._lost(event)
        elif event.kind == EventKind.MESSAGE:
            try:
                self._message(event, pm.decode(event.payload))
            except (pm.PcieProtocolError, DeviceError, ValueError) as error:
                self._refused.setdefault(event.connection, str(error))
                self._inner.close_connection(event.connection)
        else:
            self._emit(event)

    def _message(self, event: Event, message: pm.Message) -> None:
        connection, device = event.connection, self._device()
        if isinstance(message, pm.Greeting):
            dialled = device.greetings.answer(connection, message)
            kind = EventKind.CONNECTED if dialled else EventKind.ACCEPTED
            self._emit(Event(kind, connection, connection, 0, 0, 0, event.time_ns, b"", ""))
        elif device.greetings.peer_process(connection) is None:
            raise pm.PcieProtocolError(f"{type(message).__name__} came before the greeting")
        elif isinstance(message, pm.Upper):
            self._emit(event._replace(payload=message.payload))
        elif isinstance(message, pm.Offered):
            device.incoming.on_offered(connection, message)
        elif isinstance(message, pm.Taken):
            device.outgoing.on_taken(connection, message)
        else:
            device.incoming.on_revoked(connection, message.post)

    def _lost(self, event: Event) -> None:
        connection, device = event.connection, self._device()
        device.greetings.forget(connection)
        device.incoming.on_lost(connection, event.detail)
        device.outgoing.on_lost(connection, event.detail)
        device.memory.forget(connection)
        closed = self._moved.closed(event)
        self._emit(closed._replace(detail=self._refused.pop(connection, event.detail)))

    # -- inside: both halves

    def _device(self) -> _OnDevice:
        if self._attached is None:
            raise ValueError("backend pcie needs a KV cache on a device (attach_device)")
        return self._attached

    def _tell(self, connection: int, message: pm.Message) -> None:
        try:
            self._inner.send(connection, pm.encode(message))
        except (OSError, ValueError):
            return  # the connection is going down: its CLOSED says so

    def _report(
        self, kind: EventKind, connection: int, id: int, status: Status, length: int, detail: str
    ) -> None:
        event = Event(kind, connection, id, status, 0, length, time.monotonic_ns(), b"", detail)
        self._moved.ended(event)
        self._emit(event)

    def _emit(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def _wake_up(self) -> None:
        os.eventfd_write(self._wake, 1)
