# SPDX-License-Identifier: Apache-2.0
"""The control thread runs what was ordered before it hears what peers make of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from sage_kv_connector.engine.control.loop import ControlLoop

PATIENCE_S = 10.0


class _Event(NamedTuple):
    time_ns: int


class _Source:
    """One event for each time that it is told to have one."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._events: list[_Event] = []

    def happen(self) -> None:
        self._events.append(_Event(time.monotonic_ns()))
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def poll(self) -> list[_Event]:
        os.eventfd_read(self._fd)
        taken, self._events = self._events, []
        return taken


@pytest.fixture
def source() -> Iterator[_Source]:
    made = _Source()
    yield made
    os.close(made.fileno())


@pytest.mark.parametrize("order_first", [True, False])
def test_orders_and_events_run_as_they_came_about(source: _Source, order_first: bool) -> None:
    """An offer that was ordered before the subscription of a peer that knows of it; a session's end before an order
    to use it. Both wake the thread together."""
    loop, seen, ended = ControlLoop(), [], threading.Event()

    def note(what: str) -> None:
        seen.append(what)
        if len(seen) == 2:
            ended.set()

    busy, go_on = threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        go_on.wait(PATIENCE_S)

    loop.watch(source, lambda event: note("event"))
    loop.start()
    try:
        loop.submit(loop.call_later, 0.0, work)  # it begins when no order is left
        assert busy.wait(PATIENCE_S)
        if order_first:
            loop.submit(note, "order")
        source.happen()
        if not order_first:
            loop.submit(note, "order")
        go_on.set()
        assert ended.wait(PATIENCE_S)
    finally:
        loop.stop()
    assert seen == (["order", "event"] if order_first else ["event", "order"])


def test_a_step_that_fails_ends_nothing(source: _Source) -> None:
    loop, heard = ControlLoop(), threading.Event()
    loop.watch(source, lambda event: heard.set())
    loop.start()
    try:
        loop.submit(int, "no number")
        source.happen()
        assert heard.wait(PATIENCE_S)
    finally:
        loop.stop()
