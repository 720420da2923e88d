# SPDX-License-Identifier: Apache-2.0
"""The control thread: waits for backends' events, commands of other threads and timers.

It owns all state of sessions, producer and consumer, so none of them locks.
Other threads only ``submit``. While nothing happens it sleeps in epoll without
a timeout: an idle engine costs nothing.
"""

from __future__ import annotations

import ctypes
import heapq
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Protocol

from sage_kv_connector.backends.base import Event

logger = logging.getLogger(__name__)


_PR_SET_NAME = 15


def _name_thread(name: bytes) -> None:
    """What ``top -H`` and ``ps -L`` show; Python 3.11 names its threads for itself only."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)


class EventSource(Protocol):
    """A backend, or anything else with a queue of events."""

    def fileno(self) -> int:
        """Readable while events wait."""
        ...

    def poll(self, max_events: int = 256) -> Sequence[Event]: ...


class Timer:
    """Handle of ``call_later``; ``cancel`` is idempotent."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], None]) -> None:
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ControlLoop:
    """One thread; everything it calls runs there. Life: construct, start, … submit …, stop."""

    def __init__(
        self, sources: Iterable[EventSource], on_event: Callable[[EventSource, Event], None]
    ) -> None:
        self._on_event = on_event
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._sources: dict[int, EventSource] = {}
        for source in sources:
            self._sources[source.fileno()] = source
            self._epoll.register(source.fileno(), select.EPOLLIN)
        self._commands: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = count()
        self._woken = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sage-kvt-control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: Callable[[], None]) -> None:
        """Run ``command`` on the control thread, soon, in order of submission; any thread may call."""
        self._commands.append(command)
        if not self._woken and not self._stopping:
            self._woken = True
            os.eventfd_write(self._wake, 1)

    def call(self, command: Callable[[], object], timeout_s: float) -> None:
        """Run ``command`` on the control thread and wait for it. Raises what it raised, or TimeoutError.

        Where that thread does not run (yet, or any more), nothing else owns the state: it runs here then.
        """
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            command()
            return
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        self.submit(run)
        done.result(timeout_s)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Control thread only."""
        timer = Timer(time.monotonic() + delay_s, callback)
        heapq.heappush(self._timers, (timer.due, next(self._sequence), timer))
        return timer

    def stop(self) -> None:
        """Run what was submitted, end the thread. Idempotent."""
        if self._stopping:
            return

        def end() -> None:
            self._stopping = True

        if self._thread.is_alive():
            self.submit(end)
            self._thread.join()
        self._stopping = True
        self._epoll.close()
        os.close(self._wake)

    def _run(self) -> None:
        _name_thread(b"sage-kvt-ctl")
        while not self._stopping:
            for fd, _ in self._epoll.poll(self._next_timeout()):
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    self._drain(self._sources[fd])
            self._woken = False  # before the commands are looked at, so that none is left lying
            while self._commands:
                self._guarded(self._commands.popleft())
            self._run_timers()

    def _drain(self, source: EventSource) -> None:
        for event in source.poll():
            self._guarded(lambda event=event: self._on_event(source, event))  # type: ignore[misc]

    def _next_timeout(self) -> float:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._guarded(callback)

    def _guarded(self, command: Callable[[], None]) -> None:
        """One broken step must not end the thread that every transfer depends on."""
        try:
            command()
        except Exception:
            logger.exception("a step of the KV transport's control thread failed")
