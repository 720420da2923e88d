# SPDX-License-Identifier: Apache-2.0
"""The control thread runs what was ordered before it hears what peers make of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from sage_kv_connector.engine.control.loop import ControlLoop

PATIENCE_S = 10.0


class _Source:
    """One event for each time that it is told to have one."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)

    def happen(self) -> None:
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def poll(self) -> list[str]:
        os.eventfd_read(self._fd)
        return ["event"]


@pytest.fixture
def source() -> Iterator[_Source]:
    made = _Source()
    yield made
    os.close(made.fileno())


def test_an_order_runs_before_an_event_that_it_may_have_caused(source: _Source) -> None:
    """An offer that was ordered, and the subscription of a peer that knows of it, wake the thread together."""
    loop, seen, heard = ControlLoop(), [], threading.Event()

    def on_event(event: str) -> None:
        seen.append(event)
        heard.set()

    busy, go_on = threading.Event(), threading.Event()

    def work() -> None:
        busy.set()
        go_on.wait(PATIENCE_S)

    loop.watch(source, on_event)
    loop.start()
    try:
        loop.submit(loop.call_later, 0.0, work)  # it begins when no order is left
        assert busy.wait(PATIENCE_S)
        loop.submit(seen.append, "order")
        source.happen()
        go_on.set()
        assert heard.wait(PATIENCE_S)
    finally:
        loop.stop()
    assert seen == ["order", "event"]


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
