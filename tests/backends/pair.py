# SPDX-License-Identifier: Apache-2.0
"""Two connected backends of one process, and their events by kind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

import numpy as np
import numpy.typing as npt

from sage_kv_connector.backends.base import Backend, Event, EventKind, Segments
from sage_kv_connector.backends.shm import ShmBackend
from sage_kv_connector.backends.tcp import TcpBackend

#: Small chunks and a small arena, so that little data takes many turns.
KINDS: dict[str, Callable[[], Backend]] = {
    "shm-direct": lambda: ShmBackend(chunk_bytes=16384),
    "shm-arena": lambda: ShmBackend(chunk_bytes=16384, allow_direct=False, arena_bytes=1 << 20),
    "tcp": lambda: TcpBackend(chunk_bytes=16384),
    "tcp-2-lanes": lambda: TcpBackend(chunk_bytes=16384, lanes=2),
}


class Inbox:
    """Events of one backend; ``take`` waits for the first of a kind."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seen: list[Event] = []

    def take(self, *kinds: EventKind, timeout_s: float = 10.0) -> Event:
        until = time.monotonic() + timeout_s
        while True:
            for event in self.seen:
                if event.kind in kinds:
                    self.seen.remove(event)
                    return event
            if time.monotonic() > until:
                raise AssertionError(f"no {[k.name for k in kinds]}; seen: {self.seen}")
            self._backend.wait(0.05)
            self.seen += self._backend.poll()


def listen(backend: Backend) -> str:
    what = backend.capabilities
    return backend.listen(f"{what.name}://" if what.same_node_only else f"{what.name}://127.0.0.1:0")


class Pair:
    """``sender`` listens and posts, ``receiver`` connects and opens windows."""

    def __init__(self, kind: str) -> None:
        self.sender, self.receiver = KINDS[kind](), KINDS[kind]()
        self.sent, self.landed = Inbox(self.sender), Inbox(self.receiver)
        self.incoming_address = listen(self.sender)
        self.incoming = self.receiver.connect(self.incoming_address, 5.0)
        self.outgoing = self.sent.take(EventKind.ACCEPTED).connection
        self.landed.take(EventKind.CONNECTED)

    def authorize(self) -> Self:
        self.sender.authorize(self.outgoing)
        self.receiver.authorize(self.incoming)
        return self

    def __enter__(self) -> Self:
        return self.authorize()

    def __exit__(self, *_: object) -> None:
        self.sender.close()
        self.receiver.close()


def memory(backend: Backend, size: int, seed: int | None = None) -> npt.NDArray[np.uint8]:
    data = (
        np.zeros(size, np.uint8)
        if seed is None
        else np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    )
    backend.register_memory(data.ctypes.data, size)
    return data


def runs(data: npt.NDArray[np.uint8], pieces: list[tuple[int, int]]) -> Segments:
    """(start, length) within ``data`` as segments."""
    return np.array([(data.ctypes.data + start, length) for start, length in pieces], dtype=np.uint64)


def whole(data: npt.NDArray[np.uint8]) -> Segments:
    return runs(data, [(0, len(data))])


def from_start(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """One descriptor of everything."""
    return np.array([(data.ctypes.data, 0, len(data))], dtype=np.uint64)
