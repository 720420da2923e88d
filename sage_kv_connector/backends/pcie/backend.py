# SPDX-License-Identifier: Apache-2.0
"""Same node, device to device: the receiver copies straight out of the sender's device memory.

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
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sage_kv_connector.backends.base import (
    Capabilities,
    ConnectionInfo,
    Descriptors,
    Event,
    EventKind,
    Segments,
    Status,
    checked_table,
)
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.ipc_memory import IpcMemory
from sage_kv_connector.backends.pcie.window_copies import DeviceWindow
from sage_kv_connector.backends.shm.backend import ShmBackend
from sage_kv_connector.devices.dma_lane import DmaLane
from sage_kv_connector.devices.runtime import CopyKind, DeviceError, DeviceMemory

if TYPE_CHECKING:
    from sage_kv_connector.config import KVTransportConfig

HOST, DEVICE = b"H", b"D"
#: Ids of device windows and posts are above any that shm gives.
FIRST_ID = 1 << 48


class _Post:
    __slots__ = ("connection", "detail", "length", "open_parts", "status")

    def __init__(self, connection: int, length: int, parts: int) -> None:
        self.connection, self.length = connection, length
        self.open_parts = set(range(parts))
        self.status, self.detail = Status.OK, ""


class _Copy:
    """One Offered that the lane works on."""

    __slots__ = ("connection", "nbytes", "part", "post", "revoked", "window")

    def __init__(self, connection: int, window: int, post: int, part: int, nbytes: int) -> None:
        self.connection, self.window, self.post, self.part, self.nbytes = (
            connection,
            window,
            post,
            part,
            nbytes,
        )
        self.revoked = False


class PcieBackend:
    """Made without a device; ``attach_device`` comes before ``listen`` and ``connect``."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "pcie", True, True, False, True, pm.MAX_COPIES, ShmBackend.capabilities.max_message_bytes - 64
    )

    def __init__(self, inner: ShmBackend) -> None:
        self._inner = inner
        self._lock = threading.RLock()
        self._ids = count(FIRST_ID)
        self._greeted: dict[int, pm.Greeting] = {}
        self._dialled: set[int] = set()
        self._refused: dict[int, str] = {}
        self._windows: dict[int, DeviceWindow] = {}
        self._posts: dict[int, _Post] = {}
        self._copies: dict[int, _Copy] = {}
        self._events: deque[Event] = deque()
        self._copied: deque[tuple[int, str]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._epoll.register(inner.fileno(), select.EPOLLIN)
        self._memory: IpcMemory | None = None
        self._lane: DmaLane | None = None
        self._closed = False

    @classmethod
    def from_config(cls, config: KVTransportConfig) -> PcieBackend:
        return cls(ShmBackend.from_config(config))

    def attach_device(self, device: DeviceMemory) -> None:
        """The device whose memory moves. Raises DeviceError when it can't have a stream."""
        self._memory = IpcMemory(device)
        self._lane = DmaLane(device.runtime, device.number, CopyKind.DEVICE_TO_DEVICE, self._on_lane)

    # -- memory

    def register_memory(self, address: int, length: int) -> int:
        return self._inner.register_memory(address, length)

    def register_device_memory(self, address: int, length: int) -> None:
        """As ``register_memory``, for memory of the device, until ``close``. Raises DeviceError."""
        self._device_memory().register(address, length)

    def deregister_memory(self, region: int) -> None:
        self._inner.deregister_memory(region)

    # -- connections

    def listen(self, address: str) -> str:
        bound = self._inner.listen(address.replace("pcie://", "shm://", 1))
        return f"pcie://{self._device_memory().vendor}@{bound.removeprefix('shm://')}"

    def connect(self, address: str, timeout_s: float) -> int:
        vendor, separator, name = address.removeprefix("pcie://").partition("@")
        if not separator or vendor != self._device_memory().vendor:
            raise ValueError(
                f"address {address!r}: {vendor or 'no vendor'} there, {self._device_memory().vendor} here"
            )
        connection = self._inner.connect(f"shm://{name}", timeout_s)
        with self._lock:
            self._dialled.add(connection)
        return connection

    def authorize(self, connection: int) -> None:
        self._inner.authorize(connection)

    def connection_info(self, connection: int) -> ConnectionInfo:
        peer = self._inner.connection_info(connection).peer
        return ConnectionInfo(peer, "ipc", "", False, 1)

    def close_connection(self, connection: int) -> None:
        self._inner.close_connection(connection)

    def send(self, connection: int, message: bytes) -> None:
        self._inner.send(connection, pm.encode(pm.Upper(message)))

    # -- windows and posts

    def open_window(
        self, connection: int, segments: Segments, generation: int, *, notify_chunks: bool = False
    ) -> int:
        segments = checked_table(segments, "segments", 2)
        if not self._device_memory().covers(segments):
            return self._inner.open_window(connection, segments, generation, notify_chunks=notify_chunks)
        with self._lock:
            window = next(self._ids)
            self._windows[window] = DeviceWindow(connection, segments, generation)
            return window

    def window_descriptor(self, window: int) -> bytes:
        if window < FIRST_ID:
            return HOST + self._inner.window_descriptor(window)
        return DEVICE + window.to_bytes(8, "little")

    def close_window(self, window: int) -> int:
        if window < FIRST_ID:
            return self._inner.close_window(window)
        with self._lock:
            known = self._windows.pop(window, None)
        if known is None:
            return 0
        for job in list(known.jobs):
            self._cancel_copy(job, Status.CANCELLED, "the window was closed")
        return known.landed

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
                f"window_descriptor of {len(window_descriptor)} bytes is none of the pcie backend"
            )
        descriptors = checked_table(descriptors, "descriptors", 3)
        window = int.from_bytes(where, "little")
        with self._lock:
            greeting = self._greeted.get(connection)
            if greeting is None:
                raise ValueError(f"connection is {connection}, which is not open")
            parts = [descriptors[at : at + pm.MAX_COPIES] for at in range(0, len(descriptors), pm.MAX_COPIES)]
            offers = [self._device_memory().export(part, greeting.process) for part in parts]
            post = next(self._ids)
            self._posts[post] = _Post(connection, int(descriptors[:, 2].sum()), len(parts))
        for number, (handles, sizes, table) in enumerate(offers):
            offered = pm.Offered(post, number, window, generation, handles, sizes, table)
            self._inner.send(connection, pm.encode(offered))
        return post

    def cancel(self, post: int) -> None:
        if post < FIRST_ID:
            self._inner.cancel(post)
            return
        with self._lock:
            known = self._posts.get(post)
            if known is None:
                return
            known.status = Status.CANCELLED
        self._tell(known.connection, pm.Revoked(post))

    # -- events

    def poll(self, max_events: int = 256) -> Sequence[Event]:
        if not self._closed:
            for event in self._inner.poll(max_events):
                self._from_inner(event)
            self._from_lane()
        with self._lock:
            out = [self._events.popleft() for _ in range(min(max_events, len(self._events)))]
            if self._events:
                os.eventfd_write(self._wake, 1)
        return out

    def wait(self, timeout_s: float) -> bool:
        with self._lock:
            if self._events:
                return True
        return bool(self._epoll.poll(timeout_s, 1))

    def fileno(self) -> int:
        return self._epoll.fileno()

    def counters(self) -> dict[str, int]:
        lane = self._lane
        own = {"d2d_bytes": lane.bytes_copied, "d2d_ns": lane.busy_ns} if lane else {}
        return self._inner.counters() | own | {"device_offers": len(self._copies)}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._lane is not None:
            self._lane.close()
        if self._memory is not None:
            self._memory.close()
        self._inner.close()
        self._epoll.close()
        os.close(self._wake)

    # -- inside: what the inner backend reports

    def _from_inner(self, event: Event) -> None:
        if event.kind in (EventKind.CONNECTED, EventKind.ACCEPTED):
            self._greet(event.connection)
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

    def _greet(self, connection: int) -> None:
        memory = self._device_memory()
        # The dialler greets first; the other side's probe can then be meant for its process.
        if connection in self._dialled:
            self._inner.send(connection, pm.encode(pm.Greeting(memory.vendor, memory.process, b"")))

    def _message(self, event: Event, message: pm.Message) -> None:
        connection = event.connection
        if isinstance(message, pm.Greeting):
            self._on_greeting(event, message)
        elif connection not in self._greeted:
            raise pm.PcieProtocolError(f"{type(message).__name__} came before the greeting")
        elif isinstance(message, pm.Upper):
            self._emit(event._replace(payload=message.payload))
        elif isinstance(message, pm.Offered):
            self._on_offered(connection, message)
        elif isinstance(message, pm.Taken):
            self._on_taken(connection, message)
        else:
            for job in [
                j for j, c in self._copies.items() if c.post == message.post and c.connection == connection
            ]:
                self._copies[job].revoked = True

    def _on_greeting(self, event: Event, greeting: pm.Greeting) -> None:
        memory, connection = self._device_memory(), event.connection
        if connection in self._greeted or greeting.vendor != memory.vendor:
            raise pm.PcieProtocolError(
                f"vendor is {greeting.vendor!r}, {memory.vendor!r} here; or greeted twice"
            )
        dialled = connection in self._dialled
        if dialled:
            memory.try_probe(greeting.probe)
        else:
            probe = memory.probe(greeting.process)
            self._inner.send(connection, pm.encode(pm.Greeting(memory.vendor, memory.process, probe)))
        self._greeted[connection] = greeting
        kind = EventKind.CONNECTED if dialled else EventKind.ACCEPTED
        self._emit(Event(kind, connection, connection, 0, 0, 0, event.time_ns, b"", ""))

    def _lost(self, event: Event) -> None:
        connection = event.connection
        known = self._greeted.pop(connection, None)
        self._dialled.discard(connection)
        for job in [job for job, copy in self._copies.items() if copy.connection == connection]:
            self._cancel_copy(job, Status.CONNECTION_LOST, "")
        for post in [post for post, one in self._posts.items() if one.connection == connection]:
            self._sent(post, Status.CONNECTION_LOST, event.detail)
        for window, one in self._windows.items():
            if one.connection == connection:
                self._window_failed(window, Status.CONNECTION_LOST, event.detail)
        self._device_memory().forget(connection)
        detail = self._refused.pop(connection, event.detail)
        if known is not None or event.kind == EventKind.CLOSED:
            self._emit(event._replace(detail=detail))

    # -- inside: the receiver

    def _on_offered(self, connection: int, offer: pm.Offered) -> None:
        window = self._windows.get(offer.window)
        if window is None or window.connection != connection or window.ended:
            self._take_back(connection, offer, Status.CANCELLED, "the window is closed")
            return
        if window.generation != offer.generation:
            self._take_back(connection, offer, Status.STALE_GENERATION, "")
            return
        rows = pm.rows_of(offer)
        try:
            bases = self._device_memory().opened(connection, offer.handles)
            incoming = np.empty((len(rows), 3), dtype=np.uint64)
            incoming[:, 0] = np.asarray(bases, dtype=np.uint64)[rows[:, 0].astype(np.int64)] + rows[:, 1]
            incoming[:, 1:] = rows[:, 2:]
            copies = window.copies(incoming)
        except (DeviceError, ValueError) as error:
            status = Status.IO_ERROR if isinstance(error, DeviceError) else Status.OUT_OF_BOUNDS
            self._window_failed(offer.window, status, str(error))
            self._take_back(connection, offer, status, str(error))
            return
        job = next(self._ids)
        self._copies[job] = _Copy(connection, offer.window, offer.post, offer.part, int(rows[:, 3].sum()))
        window.jobs.add(job)
        assert self._lane is not None
        self._lane.submit(job, copies)

    def _from_lane(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._copied:
            job, error = self._copied.popleft()
            copy = self._copies.pop(job, None)
            if copy is None:
                continue
            window = self._windows.get(copy.window)
            if window is not None:
                window.jobs.discard(job)
            if error:
                self._window_failed(copy.window, Status.IO_ERROR, error)
            elif copy.revoked:
                pass  # the sender took it back: it does not count
            elif window is not None and not window.ended:
                window.landed += copy.nbytes
                if window.landed == window.size:
                    window.ended = True
                    self._emit(
                        self._event(
                            EventKind.WINDOW_DONE, copy.connection, copy.window, Status.OK, window.size
                        )
                    )
            status = Status.IO_ERROR if error else Status.CANCELLED if copy.revoked else Status.OK
            self._tell(copy.connection, pm.Taken(copy.post, copy.part, status, error[: pm.MAX_DETAIL]))

    def _cancel_copy(self, job: int, status: Status, detail: str) -> None:
        """Wait for it or take it off the lane; the sender is told."""
        copy = self._copies.pop(job, None)
        if copy is None:
            return
        assert self._lane is not None
        self._lane.cancel(job)
        if status != Status.CONNECTION_LOST:
            self._tell(copy.connection, pm.Taken(copy.post, copy.part, status, detail))

    def _take_back(self, connection: int, offer: pm.Offered, status: Status, detail: str) -> None:
        self._tell(connection, pm.Taken(offer.post, offer.part, status, detail[: pm.MAX_DETAIL]))

    def _window_failed(self, window: int, status: Status, detail: str) -> None:
        known = self._windows.get(window)
        if known is not None and not known.ended:
            known.ended = True
            self._emit(self._event(EventKind.WINDOW_FAILED, known.connection, window, status, 0, detail))

    # -- inside: the sender

    def _on_taken(self, connection: int, taken: pm.Taken) -> None:
        post = self._posts.get(taken.post)
        if post is None or post.connection != connection or taken.part not in post.open_parts:
            raise pm.PcieProtocolError(f"part {taken.part} of post {taken.post} is not under way")
        post.open_parts.discard(taken.part)
        if taken.status not in set(Status):
            raise pm.PcieProtocolError(f"status is {taken.status}")
        if taken.status != Status.OK and post.status == Status.OK:
            post.status, post.detail = Status(taken.status), taken.detail[: pm.MAX_DETAIL]
        if not post.open_parts:
            self._sent(taken.post, post.status, post.detail)

    def _sent(self, post: int, status: Status, detail: str) -> None:
        with self._lock:
            known = self._posts.pop(post)
        self._emit(self._event(EventKind.SENT, known.connection, post, status, known.length, detail))

    # -- inside: both

    def _device_memory(self) -> IpcMemory:
        if self._memory is None:
            raise ValueError("backend pcie needs a KV cache on a device (attach_device)")
        return self._memory

    def _tell(self, connection: int, message: pm.Message) -> None:
        try:
            self._inner.send(connection, pm.encode(message))
        except (OSError, ValueError):
            return  # the connection is going down: its CLOSED says so

    def _event(
        self, kind: EventKind, connection: int, id: int, status: Status, length: int, detail: str = ""
    ) -> Event:
        return Event(kind, connection, id, status, 0, length, time.monotonic_ns(), b"", detail)

    def _emit(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def _on_lane(self, job: int, error: str) -> None:
        self._copied.append((job, error))
        os.eventfd_write(self._wake, 1)
