# SPDX-License-Identifier: Apache-2.0
"""Timers of the control thread: a heap by due time; cancelled ones are dropped when they come up."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import Any


class Timer:
    """Handle of a call to come; ``cancel`` is idempotent."""

    __slots__ = ("_call",)

    def __init__(self, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._call: tuple[Callable[..., object], tuple[Any, ...]] | None = (function, arguments)

    @property
    def cancelled(self) -> bool:
        return self._call is None

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> None:
        """Call it, unless it was cancelled."""
        if self._call is not None:
            function, arguments = self._call
            function(*arguments)


class Timers:
    """All timers of one loop. Control thread only."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._sequence = count()

    def add(self, delay_s: float, function: Callable[..., object], arguments: tuple[Any, ...]) -> Timer:
        timer = Timer(function, arguments)
        heapq.heappush(self._heap, (time.monotonic() + delay_s, next(self._sequence), timer))
        return timer

    def next_timeout(self) -> float:
        """Seconds until the next one is due, -1 where there is none."""
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - time.monotonic()) if self._heap else -1

    def pop_due(self) -> Timer | None:
        """The next one that is due now, taken out."""
        if self._heap and self._heap[0][0] <= time.monotonic():
            return heapq.heappop(self._heap)[2]
        return None
