# SPDX-License-Identifier: Apache-2.0
"""Timers of the control thread: a heap by due time, of which cancelled ones are at most about half."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from itertools import count
from typing import Any

#: So many cancelled ones are no reason to sweep.
FEW = 64


class Timer:
    """Handle of a call to come; ``cancel`` is idempotent."""

    __slots__ = ("_call", "_timers")

    def __init__(self, timers: Timers, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._timers = timers
        self._call: tuple[Callable[..., object], tuple[Any, ...]] | None = (function, arguments)

    @property
    def cancelled(self) -> bool:
        return self._call is None

    def cancel(self) -> None:
        if self._call is not None:
            self._call = None
            self._timers.one_cancelled()

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
        self._cancelled = 0  #: since the last sweep

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, delay_s: float, function: Callable[..., object], arguments: tuple[Any, ...]) -> Timer:
        timer = Timer(self, function, arguments)
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

    def one_cancelled(self) -> None:
        """Most are cancelled, long before they are due: they are not kept until then."""
        self._cancelled += 1
        if self._cancelled > max(FEW, len(self._heap) // 2):
            self._heap = [entry for entry in self._heap if not entry[2].cancelled]
            heapq.heapify(self._heap)
            self._cancelled = 0
