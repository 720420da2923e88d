# SPDX-License-Identifier: Apache-2.0
"""A Backend inside one process: what the engine's tests steer, and the smallest example of one.

It checks and bounds nothing, so the contract's tests don't run over it.
Copies happen at once unless ``hold_posts`` is set; ``fail_window`` makes the next
chunk of each post fail at the receiver with the given status.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import count

from sage_kv_connector.backends.base import (
    Capabilities,
    ConnectionInfo,
    Descriptors,
    Event,
    EventKind,
    Segments,
    Status,
)

_listeners: dict[str, MemoryBackend] = {}
_ids = count(1)
_lock = threading.RLock()


class _End:
    """One side of a connection."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend = backend
        self.id = next(_ids)
        self.peer: _End | None = None


class _Window:
    def __init__(self, end: _End, segments: Segments, generation: int) -> None:
        self.end, self.generation = end, generation
        self.segments = segments.tolist()
        self.size = sum(length for _, length in self.segments)
        self.landed = 0


class MemoryBackend:
    capabilities = Capabilities("memory", rank=0, crosses_nodes=False)

    def __init__(self) -> None:
        self.hold_posts = False
        self.fail_window: Status | None = None
        self.watched: set[int] = set()
        self._events: deque[Event] = deque()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._ends: dict[int, _End] = {}
        self._windows: dict[int, _Window] = {}
        self._held: dict[int, tuple[_End, int, Descriptors, int]] = {}
        self._address = ""

    def register_memory(self, address: int, length: int) -> int:
        return next(_ids)

    def deregister_memory(self, region: int) -> None:
        pass

    def listen(self, address: str) -> str:
        self._address = f"{self.capabilities.name}://{next(_ids)}"
        _listeners[self._address] = self
        return self._address

    def connect(self, address: str, timeout_s: float) -> int:
        with _lock:
            listener = _listeners.get(address)
            if listener is None:
                raise OSError(f"nobody listens on {address}")
            mine, theirs = _End(self), _End(listener)
            mine.peer, theirs.peer = theirs, mine
            self._ends[mine.id], listener._ends[theirs.id] = mine, theirs
            listener._emit(EventKind.ACCEPTED, theirs.id)
            self._emit(EventKind.CONNECTED, mine.id)
            return mine.id

    def authorize(self, connection: int) -> None:
        pass

    def watch(self, connection: int, timeout_s: float) -> None:
        self.watched.add(connection)

    def unwatch(self, connection: int) -> None:
        self.watched.discard(connection)

    def connection_info(self, connection: int) -> ConnectionInfo:
        return ConnectionInfo("memory", "direct", "", False, 1)

    def close_connection(self, connection: int) -> None:
        with _lock:
            end = self._ends.pop(connection, None)
            if end is None:
                return
            for other in (end, end.peer):
                assert other is not None
                other.backend._lose(other)

    def _lose(self, end: _End) -> None:
        self._ends.pop(end.id, None)
        for window_id, window in list(self._windows.items()):
            if window.end is end:
                self._emit(EventKind.WINDOW_FAILED, end.id, window_id, Status.CONNECTION_LOST)
        for post, (owner, *_) in list(self._held.items()):
            if owner is end:
                del self._held[post]
                self._emit(EventKind.SENT, end.id, post, Status.CONNECTION_LOST)
        self._emit(EventKind.CLOSED, end.id, 0, Status.CONNECTION_LOST, detail="closed")

    def send(self, connection: int, message: bytes) -> None:
        with _lock:
            end = self._ends.get(connection)
            if end is not None and end.peer is not None:
                end.peer.backend._emit(EventKind.MESSAGE, end.peer.id, payload=message)

    def open_window(
        self, connection: int, segments: Segments, generation: int, *, notify_chunks: bool = False
    ) -> int:
        window = next(_ids)
        self._windows[window] = _Window(self._end_of(connection), segments, generation)
        return window

    def _end_of(self, connection: int) -> _End:
        if connection not in self._ends:
            raise ConnectionError(f"connection {connection} is closed")
        return self._ends[connection]

    def window_descriptor(self, window: int) -> bytes:
        return struct.pack("<Q", window)

    def close_window(self, window: int) -> int:
        with _lock:
            known = self._windows.pop(window, None)
            return known.landed if known else 0

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
        with _lock:
            post = next(_ids)
            (window,) = struct.unpack("<Q", window_descriptor)
            self._held[post] = (self._end_of(connection), window, descriptors, generation)
            if not self.hold_posts:
                self.let_posts_go()
            return post

    def let_posts_go(self) -> None:
        with _lock:
            for post, (end, window_id, descriptors, generation) in list(self._held.items()):
                del self._held[post]
                assert end.peer is not None
                end.peer.backend._land(end.peer, window_id, descriptors, generation, self.fail_window)
                total = int(descriptors[:, 2].sum())
                self._emit(EventKind.SENT, end.id, post, Status.OK, length=total)

    def _land(
        self, end: _End, window_id: int, descriptors: Descriptors, generation: int, fail: Status | None
    ) -> None:
        window = self._windows.get(window_id)
        if window is None or window.end is not end:
            return
        if fail is None and generation != window.generation:
            fail = Status.STALE_GENERATION
        if fail is not None:
            self._emit(EventKind.WINDOW_FAILED, end.id, window_id, fail)
            return
        for source, offset, length in descriptors.tolist():
            _scatter(window.segments, source, offset, length)
            window.landed += length
        if window.landed == window.size:
            self._emit(EventKind.WINDOW_DONE, end.id, window_id, Status.OK, length=window.size)

    def cancel(self, post: int) -> None:
        with _lock:
            held = self._held.pop(post, None)
            if held is not None:
                self._emit(EventKind.SENT, held[0].id, post, Status.CANCELLED)

    def poll(self, max_events: int = 256) -> Sequence[Event]:
        with _lock:
            events = list(self._events)
            self._events.clear()
            if self._fd >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._fd)
            return events

    def wait(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while not self._events and time.monotonic() < until:
            time.sleep(0.001)
        return bool(self._events)

    def fileno(self) -> int:
        return self._fd

    def counters(self) -> dict[str, int]:
        return {"windows": len(self._windows), "posts": len(self._held)}

    def traffic(self) -> Sequence[tuple[int, int, int]]:
        return ()

    def small_posts(self) -> Sequence[tuple[int, int]]:
        return ()

    def close(self) -> None:
        with _lock:
            _listeners.pop(self._address, None)
            for connection in list(self._ends):
                self.close_connection(connection)
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _emit(
        self,
        kind: EventKind,
        connection: int,
        id: int = 0,
        status: Status = Status.OK,
        *,
        length: int = 0,
        payload: bytes = b"",
        detail: str = "",
    ) -> None:
        if self._fd < 0:
            return
        self._events.append(
            Event(kind, connection, id, status, 0, length, time.monotonic_ns(), payload, detail)
        )
        os.eventfd_write(self._fd, 1)


def _scatter(segments: list[list[int]], source: int, offset: int, length: int) -> None:
    start = 0
    for address, size in segments:
        if offset < start + size and length:
            within = offset - start
            part = min(length, size - within)
            ctypes.memmove(address + within, source, part)
            source, offset, length = source + part, offset + part, length - part
        start += size
