# SPDX-License-Identifier: Apache-2.0
"""Two backends of one process that are connected and authorized, and what tests ask of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_kv_connector.backends.base import Backend, Event, EventKind, Status
from tests.backends.kinds import Kind
from tests.backends.places import Bytes, Places

#: Longer than anything here takes, even on a busy machine; only a hang uses it up.
PATIENCE_S = 10.0


def until(
    backend: Backend, done: Callable[[list[Event]], bool], timeout_s: float = PATIENCE_S
) -> list[Event]:
    """Events of ``backend`` until ``done`` holds for all that came; AssertionError when the time is over."""
    events: list[Event] = []
    deadline = time.monotonic() + timeout_s
    while not done(events):
        left = deadline - time.monotonic()
        if left <= 0:
            raise AssertionError(f"after {timeout_s} s there were only {events}")
        if backend.wait(min(left, 0.5)):
            events += backend.poll()
    return events


def of_kind(events: Sequence[Event], kind: EventKind, id: int | None = None) -> list[Event]:
    return [e for e in events if e.kind == kind and (id is None or e.id == id)]


def until_event(backend: Backend, kind: EventKind, id: int | None = None) -> Event:
    return of_kind(until(backend, lambda events: bool(of_kind(events, kind, id))), kind, id)[0]


class Inbox:
    """Events of one backend, kept until they are asked for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._waiting: list[Event] = []

    def next(self, kind: EventKind, id: int | None = None) -> Event:
        """The oldest event of that kind (and id), waited for if need be."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := of_kind(self._waiting, kind, id)):
            if not self._backend.wait(0.5) and time.monotonic() > deadline:
                raise AssertionError(f"after {PATIENCE_S} s there were only {self._waiting}")
            self._waiting += self._backend.poll()
        self._waiting.remove(found[0])
        return found[0]


def settle(backend: Backend, quiet_s: float = 0.2) -> list[Event]:
    """Events until none came for ``quiet_s``."""
    events: list[Event] = []
    while backend.wait(quiet_s):
        events += backend.poll()
    return events


def table(rows: Sequence[tuple[int, ...]]) -> npt.NDArray[np.uint64]:
    return np.array(rows, dtype=np.uint64)


def random_bytes(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def is_set_up(kind: Kind, backend: Backend, connection: int) -> bool:
    """Whether a connection has all that its kind has."""
    info = backend.connection_info(connection)
    return info.lanes == kind.lanes and (not backend.capabilities.mode_changes or info.mode == kind.mode)


class Pair:
    """``receiver`` listens and opens windows, ``sender`` connects and posts; their bytes lie in ``places``."""

    def __init__(self, kind: Kind, *, authorize: bool = True, **options: Any) -> None:
        self.kind = kind
        self.places = Places(kind.memory)
        self.receiver = kind.make(**options)
        self.sender = kind.make(**options)
        self.address = self.receiver.listen(kind.listen_on)
        self.to_receiver = self.sender.connect(self.address, 5.0)
        until_event(self.sender, EventKind.CONNECTED)
        self.to_sender = until_event(self.receiver, EventKind.ACCEPTED).connection
        kind.protect(self.sender, self.to_receiver, connects=True)
        kind.protect(self.receiver, self.to_sender, connects=False)
        if authorize:
            self.authorize()

    def authorize(self) -> None:
        self.sender.authorize(self.to_receiver)
        self.receiver.authorize(self.to_sender)
        deadline = time.monotonic() + PATIENCE_S
        ends = ((self.sender, self.to_receiver), (self.receiver, self.to_sender))
        while not all(is_set_up(self.kind, *end) for end in ends):
            assert time.monotonic() < deadline, [backend.connection_info(end) for backend, end in ends]
            time.sleep(0.001)

    def window(self, memory: Bytes, generation: int = 1, *, notify_chunks: bool = False) -> tuple[int, bytes]:
        """A window over all of ``memory``, which gets registered; returns (window, its descriptor)."""
        address = self.places.register(self.receiver, memory)
        window = self.receiver.open_window(
            self.to_sender, table([(address, memory.nbytes)]), generation, notify_chunks=notify_chunks
        )
        return window, self.receiver.window_descriptor(window)

    def post(
        self,
        descriptor: bytes,
        memory: Bytes,
        generation: int = 1,
        *,
        at: int = 0,
        priority: int = 0,
        checksum: bool = True,
    ) -> int:
        """Post all of ``memory``, which gets registered, to offset ``at`` of the window."""
        rows = table([(self.places.register(self.sender, memory), at, memory.nbytes)])
        return self.sender.post(
            self.to_receiver, descriptor, rows, generation, priority=priority, checksum=checksum
        )

    def sent(self, post: int) -> Event:
        return until_event(self.sender, EventKind.SENT, post)

    def ended(self, window: int) -> Event:
        """WINDOW_DONE or WINDOW_FAILED of a window."""
        ends = (EventKind.WINDOW_DONE, EventKind.WINDOW_FAILED)
        events = until(self.receiver, lambda all: any(e.kind in ends and e.id == window for e in all))
        return next(e for e in events if e.kind in ends and e.id == window)

    def transfers_still_work(self) -> None:
        """Whatever went wrong before, the pair carries a new window."""
        source, target = random_bytes(300_001, seed=9), np.zeros(300_001, np.uint8)
        window, descriptor = self.window(target, generation=77)
        post = self.post(descriptor, source, generation=77)
        assert self.ended(window).kind == EventKind.WINDOW_DONE
        assert self.sent(post).status == Status.OK
        assert np.array_equal(source, self.places.seen(target))
        self.receiver.close_window(window)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.places.free()
