# SPDX-License-Identifier: Apache-2.0
"""What stands behind a device's events: which are waited for, in which order, and what a device in trouble ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from sage_kv_connector.integrations.common.compute_events import ComputeEvents


class Event:
    """Over when ``over`` is set. ``trouble``: where it raises."""

    def __init__(self, log: list[str], name: str = "ours", trouble: str = "") -> None:
        self._log, self._name, self._trouble = log, name, trouble
        self.over = threading.Event()

    def record(self) -> None:
        self._log.append(f"record {self._name}")
        self.over.set()
        if self._trouble == "record":
            raise RuntimeError("device lost")

    def synchronize(self) -> None:
        assert self.over.wait(10)
        self._log.append(f"wait {self._name}")
        if self._trouble == "synchronize":
            raise RuntimeError("device lost")


def calls(log: list[str]) -> tuple[Callable[[], object], Callable[[str], object]]:
    return lambda: log.append("call"), log.append


def test_events_of_the_engine_are_waited_for_in_place_of_ours() -> None:
    log: list[str] = []
    computed = ComputeEvents(lambda: Event(log))
    first, second = Event(log, "first"), Event(log, "second")
    computed.behind(*calls(log), (first, second))
    computed.behind(*calls(log))
    first.over.set()
    assert not computed.settle(0.1) and log[:2] == ["record ours", "wait first"]
    second.over.set()
    assert computed.settle(10)
    assert log == ["record ours", "wait first", "wait second", "call", "wait ours", "call"]
    computed.close()


def test_without_an_event_only_the_order_is_kept() -> None:
    log: list[str] = []
    computed = ComputeEvents(lambda: Event(log))
    first = Event(log, "first")
    computed.behind(*calls(log), (first,))
    computed.behind(lambda: log.append("after"), log.append, ())
    assert not computed.settle(0.1) and log == []
    first.over.set()
    assert computed.settle(10) and log == ["wait first", "call", "after"]
    computed.close()


@pytest.mark.parametrize("trouble", ["record", "synchronize"])
def test_a_device_in_trouble_is_told_to_who_waits_and_not_to_the_engines_thread(trouble: str) -> None:
    log: list[str] = []
    computed = ComputeEvents(lambda: Event(log, trouble=trouble))
    computed.behind(*calls(log))
    assert computed.settle(10)
    assert log[-1] == "RuntimeError: device lost" and "call" not in log
    computed.close()


def test_a_call_that_raises_is_told_to_who_waits() -> None:
    log: list[str] = []
    computed = ComputeEvents(lambda: Event(log))

    def raises() -> None:
        raise ValueError("page 12 is not there")

    computed.behind(raises, log.append)
    assert computed.settle(10) and log[-1] == "ValueError: page 12 is not there"
    computed.close()
