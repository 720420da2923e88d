# SPDX-License-Identifier: Apache-2.0
"""The control thread: waits for sources' events, orders of other threads and timers.

It owns all state of sessions, producer and consumer, so none of them locks.
Other threads only ``submit``. While nothing happens it sleeps in epoll without
a timeout: an idle engine costs nothing.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from sage_kv_connector.engine.control.timers import Timer, Timers

logger = logging.getLogger(__name__)

_PR_SET_NAME = 15
#: A source that fails each time must not take a core for it.
BROKEN_SOURCE_S = 0.01
#: It looks up after this time at the latest, whatever a timer was set to: epoll takes no time of months.
LONGEST_SLEEP_S = 3600.0


class Happened(Protocol):
    """What a source tells of."""

    @property
    def time_ns(self) -> int:
        """When, by CLOCK_MONOTONIC."""
        ...


E_co = TypeVar("E_co", bound=Happened, covariant=True)
E = TypeVar("E", bound=Happened)


def _name_thread(name: bytes) -> None:
    """What ``top -H`` and ``ps -L`` show; Python 3.11 names its threads for itself only."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)


class EventSource(Protocol[E_co]):
    """A backend, or anything else with a queue of events."""

    def fileno(self) -> int:
        """Readable while events wait."""
        ...

    def poll(self) -> Sequence[E_co]: ...


class ControlLoop:
    """One thread; everything it calls runs there. Life: construct, watch …, start, … submit …, stop.

    ``on_death(why)`` is called there if it ends by a fault. What is submitted from then on runs at once, on the
    caller's thread, one at a time.
    """

    def __init__(self, on_death: Callable[[str], None] | None = None) -> None:
        self._on_death = on_death
        self.death = ""  #: the fault that ended the thread
        self._after_death = threading.RLock()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, tuple[EventSource[Any], Callable[..., object], tuple[Any, ...]]] = {}
        self._orders: deque[tuple[int, Callable[..., object], tuple[Any, ...]]] = deque()
        self._timers = Timers()
        self._woken = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sage-kvt-control", daemon=True)

    def watch(self, source: EventSource[E], handler: Callable[..., object], *first: Any) -> None:
        """Call ``handler(*first, event)`` for each event of ``source``; before ``start``."""
        self._watched[source.fileno()] = (source, handler, first)
        self._epoll.register(source.fileno(), select.EPOLLIN)

    def start(self) -> None:
        self._thread.start()

    @property
    def thread(self) -> int:
        """The thread's ident, once started."""
        assert self._thread.ident is not None
        return self._thread.ident

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run ``function(*arguments)`` on the control thread, soon, in order of submission; any thread may call."""
        self._orders.append((time.monotonic_ns(), function, arguments))
        if self.death:
            self._run_leftovers()
        elif not self._woken and not self._stopping:
            self._woken = True
            os.eventfd_write(self._wake, 1)

    def call(self, timeout_s: float, function: Callable[..., object], *arguments: Any) -> None:
        """Run ``function(*arguments)`` on the control thread and wait for it.

        Raises what it raised, or TimeoutError. Where that thread does not run (yet, or any more), nothing
        else owns the state: it runs here then.
        """
        if threading.current_thread() is self._thread or not self._thread.is_alive():
            with self._after_death:
                function(*arguments)
            return
        done: Future[None] = Future()
        self.submit(_settle, done, function, arguments)
        done.result(timeout_s)

    def call_later(self, delay_s: float, function: Callable[..., object], *arguments: Any) -> Timer:
        """Control thread only."""
        return self._timers.add(delay_s, function, arguments)

    def stop(self) -> None:
        """Run what was submitted, end the thread. Idempotent."""
        if self._stopping:
            return
        if self._thread.is_alive():
            self.submit(self._end)
            self._thread.join()
        self._stopping = True
        self._epoll.close()
        os.close(self._wake)

    def _end(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        _name_thread(b"sage-kvt-ctl")
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        logger.critical("the KV transport's control thread ended by a fault", exc_info=error)
        why = f"{type(error).__name__}: {error}"
        with self._after_death:
            if self._on_death is not None:
                self._guarded(self._on_death, why)
            self.death = why
        self._run_leftovers()

    def _run_leftovers(self) -> None:
        with self._after_death:
            self._run_orders()

    def _turn(self) -> None:
        happened = self._take_events()
        self._woken = False  # before the orders are looked at, so that none is left lying
        # In the order in which it came about: a peer may know of what was ordered here, and who orders of what
        # a peer did.
        for time_ns, handler, arguments in happened:
            self._run_orders(time_ns)
            self._guarded(handler, *arguments)
        self._run_orders()
        while (timer := self._timers.pop_due()) is not None:
            self._guarded(timer.fire)

    def _take_events(self) -> list[tuple[int, Callable[..., object], tuple[Any, ...]]]:
        """Waits for something to happen."""
        happened = []
        for fd, _ in self._epoll.poll(min(self._timers.next_timeout(), LONGEST_SLEEP_S)):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                continue
            source, handler, first = self._watched[fd]
            try:
                happened += [(event.time_ns, handler, (*first, event)) for event in source.poll()]
            except Exception:
                # Its events may be lost; those of the others must not be. It is asked again.
                logger.exception("%s could not tell its events", type(source).__name__)
                time.sleep(BROKEN_SOURCE_S)
        return happened

    def _run_orders(self, until_ns: int | None = None) -> None:
        """Those that were submitted before that moment."""
        while self._orders and (until_ns is None or self._orders[0][0] <= until_ns):
            _, function, arguments = self._orders.popleft()
            self._guarded(function, *arguments)

    def _guarded(self, function: Callable[..., object], *arguments: Any) -> None:
        """One broken step must not end the thread that every transfer depends on."""
        try:
            function(*arguments)
        except Exception:
            logger.exception("a step of the KV transport's control thread failed")


def _settle(done: Future[None], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        function(*arguments)
        done.set_result(None)
    except BaseException as error:
        done.set_exception(error)
