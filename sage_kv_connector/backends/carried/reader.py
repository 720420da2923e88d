# SPDX-License-Identifier: Apache-2.0
"""The thread that calls a library: it meets peers, reads, and says how that ended."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.carried.library import Library, LibraryError, Rows

logger = logging.getLogger(__name__)

MEET, READ, FORGET = 0, 1, 2
#: Between two looks at reads that are under way: from the first on, twice as long each time.
FIRST_LOOK_S, LONGEST_LOOK_S = 20e-6, 500e-6
#: A peer that could not be read is tried again after that time, then each time twice as late.
FIRST_RETRY_S, LONGEST_RETRY_S = 0.25, 30.0
#: So long reads that are under way may take once the backend is closed.
CLOSING_S = 5.0
IDLE_S = 3600.0
NEVER = float("inf")


class _Read(NamedTuple):
    number: int
    connection: int
    handle: object


class _Refused:
    """A peer that could not be read."""

    def __init__(self) -> None:
        self.backoff_s = 0.0
        self.due = NEVER

    def again(self) -> None:
        self.backoff_s = min(max(2 * self.backoff_s, FIRST_RETRY_S), LONGEST_RETRY_S)
        self.due = time.monotonic() + self.backoff_s


class Reader:
    """``lock``: held for each call of the library."""

    def __init__(
        self,
        endpoint: _data_plane.CarriedEndpoint,
        library: Library,
        lock: AbstractContextManager[object],
        name: str,
    ) -> None:
        self._endpoint, self._library, self._lock = endpoint, library, lock
        self._descriptions: dict[int, bytes] = {}
        self._refused: dict[int, _Refused] = {}
        self._reads: deque[_Read] = deque()
        self._closing = False
        self.failures = 0
        self._thread = threading.Thread(target=self._run, name=f"sage-kvt-{name}", daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """After the endpoint's. Returns whether no read is under way any more."""
        self._closing = True
        self._thread.join()
        return not self._reads

    def _run(self) -> None:
        look_s = FIRST_LOOK_S
        closing_at = 0.0
        while not self._closing or self._reads:
            if self._closing:
                closing_at = closing_at or time.monotonic()
                if time.monotonic() > closing_at + CLOSING_S:
                    return
            job = self._endpoint.next_job(look_s if self._reads else self._idle_s())
            if job is not None:
                self._do(*job)
                look_s = FIRST_LOOK_S
            elif self._closing and self._reads:
                time.sleep(look_s)  # a closed endpoint does not wait
            look_s = FIRST_LOOK_S if self._look() else min(2 * look_s, LONGEST_LOOK_S)
            self._retry()

    def _idle_s(self) -> float:
        due = min((one.due for one in self._refused.values()), default=None)
        return IDLE_S if due is None else min(max(due - time.monotonic(), 0.0), IDLE_S)

    def _do(self, what: int, connection: int, number: int, description: bytes, rows: Rows) -> None:
        if what == MEET:
            self._descriptions[connection] = description
            refused = self._refused.get(connection)
            if refused is None or refused.due == NEVER:  # else it is met when its time comes
                self._meet(connection)
        elif what == READ:
            self._begin(connection, number, rows)
        else:
            self._descriptions.pop(connection, None)
            self._refused.pop(connection, None)
            self._call(self._library.forget, connection)

    def _meet(self, connection: int) -> None:
        why = self._call(self._library.meet, connection, self._descriptions[connection])
        self._endpoint.met(connection, why)
        if why:
            self._refused.setdefault(connection, _Refused()).again()
        elif connection in self._refused:
            self._refused[connection].due = NEVER  # it may fail again soon: the backoff stays

    def _begin(self, connection: int, number: int, rows: Rows) -> None:
        with self._lock:
            try:
                handle = self._library.begin(connection, rows)
            except Exception as error:
                why = _text(error)
            else:
                self._reads.append(_Read(number, connection, handle))
                return
        self._failed(_Read(number, connection, None), why)

    def _look(self) -> bool:
        """Whether a read ended."""
        ended = False
        for _ in range(len(self._reads)):
            read = self._reads.popleft()
            try:
                with self._lock:
                    over = self._library.has_ended(read.handle)
            except Exception as error:
                self._failed(read, _text(error))
                ended = True
                continue
            if over:
                self._endpoint.read_ended(read.number, False)
                if self._refused:
                    self._refused.pop(read.connection, None)
                ended = True
            else:
                self._reads.append(read)
        return ended

    def _failed(self, read: _Read, why: str) -> None:
        """The chunk comes another way, and those after it do until the peer was met again."""
        self.failures += 1
        if read.connection in self._descriptions:
            refused = self._refused.setdefault(read.connection, _Refused())
            if refused.due == NEVER:  # not one of several at a time
                logger.warning("reading from a peer failed: %s; its chunks go over sockets for now", why)
                refused.again()
                self._endpoint.met(read.connection, why)
        self._endpoint.read_ended(read.number, True)

    def _retry(self) -> None:
        if not self._refused:
            return
        now = time.monotonic()
        for connection in [c for c, refused in self._refused.items() if refused.due <= now]:
            self._call(self._library.forget, connection)
            self._meet(connection)

    def _call(self, call: Callable[..., object], *arguments: object) -> str:
        """Why it failed, "" if it did not."""
        try:
            with self._lock:
                call(*arguments)
        except Exception as error:
            return _text(error)
        return ""


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, LibraryError) else f"{type(error).__name__}: {error}"
