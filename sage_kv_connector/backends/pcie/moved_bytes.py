# SPDX-License-Identifier: Apache-2.0
"""Bytes that went from device to device, by connection: shm, which carries the rest, does not see them."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from sage_kv_connector.backends.base import Event, EventKind, Status


class MovedBytes:
    """Of one backend. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moved: dict[int, tuple[int, int]] = {}  #: sent, landed

    def ended(self, event: Event) -> None:
        """A post or a window of device memory ended."""
        if event.status != Status.OK:
            return
        more = (
            event.length if event.kind == EventKind.SENT else 0,
            event.length if event.kind == EventKind.WINDOW_DONE else 0,
        )
        with self._lock:
            sent, landed = self._moved.get(event.connection, (0, 0))
            self._moved[event.connection] = (sent + more[0], landed + more[1])

    def add_to(self, traffic: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Bytes of each connection, with these."""
        with self._lock:
            moved = dict(self._moved)
        rows = []
        for connection, sent, landed in traffic:
            more = moved.get(connection, (0, 0))
            rows.append((connection, sent + more[0], landed + more[1]))
        return rows

    def closed(self, event: Event) -> Event:
        """A CLOSED event with all that moved over its connection, which is forgotten."""
        with self._lock:
            sent, landed = self._moved.pop(event.connection, (0, 0))
        return event._replace(offset=event.offset + sent, length=event.length + landed)
