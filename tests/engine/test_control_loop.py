# SPDX-License-Identifier: Apache-2.0
"""The control thread runs what was ordered before it hears what peers make of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.timers import FEW, Timers

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


def test_a_source_that_fails_ends_nothing(source: _Source) -> None:
    """Neither the thread, nor the other sources, nor what it tells afterwards."""
    loop, heard, heard_again = ControlLoop(), threading.Event(), threading.Event()
    broken = _Source()

    def fail() -> list[_Event]:
        raise RuntimeError("a vendor's error")

    told = broken.poll
    broken.poll = fail  # type: ignore[method-assign]
    loop.watch(broken, lambda event: heard_again.set())
    loop.watch(source, lambda event: heard.set())
    loop.start()
    try:
        broken.happen()
        source.happen()
        assert heard.wait(PATIENCE_S)
        broken.poll = told  # type: ignore[method-assign]
        assert heard_again.wait(PATIENCE_S)
    finally:
        loop.stop()
        os.close(broken.fileno())


@pytest.mark.parametrize("delay_s", [1e9, 1e300, float("inf")])
def test_a_timer_that_is_far_away_ends_nothing(source: _Source, delay_s: float) -> None:
    loop, heard = ControlLoop(), threading.Event()
    loop.watch(source, lambda event: heard.set())
    loop.start()
    try:
        loop.call(PATIENCE_S, loop.call_later, delay_s, heard.set)
        time.sleep(0.05)  # it sleeps with that timer
        assert not heard.is_set()
        source.happen()
        assert heard.wait(PATIENCE_S)
    finally:
        loop.stop()


@given(st.lists(st.tuples(st.floats(0, 0.002), st.booleans()), max_size=300))
def test_cancelled_timers_are_gone_and_the_others_come(planned: list[tuple[float, bool]]) -> None:
    timers = Timers()
    fired: list[float] = []
    begun = time.monotonic()
    made = [(delay, timers.add(delay, fired.append, (delay,)), stays) for delay, stays in planned]
    far = [timers.add(1e6, fired.append, (0.0,)) for _ in range(500)]
    for timer in far:
        timer.cancel()
        timer.cancel()  # once is enough
    for _, timer, stays in made:
        if not stays:
            timer.cancel()
    left = [delay for delay, _, stays in made if stays]
    assert len(timers) <= 2 * len(left) + 2 * FEW + 2
    while timers.next_timeout() >= 0 and time.monotonic() - begun < PATIENCE_S:
        while (due := timers.pop_due()) is not None:
            due.fire()
    assert sorted(fired) == sorted(left)


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
