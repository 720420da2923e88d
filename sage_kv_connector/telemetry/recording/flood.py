# SPDX-License-Identifier: Apache-2.0
"""A flood of events of one kind is no flood of log lines."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

#: At most one line of each kind in this time; the next one says how many there were.
QUIET_S = 1.0


class Flood:
    """Kinds are few, such as failure codes. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}
        self._untold: Counter[str] = Counter()

    def untold(self, kind: str, times: int = 1) -> int | None:
        """It happened ``times`` more. How many were not told since the last line; None if it is not to be told now."""
        with self._lock:
            self._untold[kind] += times
            now = self._clock()
            if kind in self._told and now - self._told[kind] < QUIET_S:
                return None
            self._told[kind] = now
            return self._untold.pop(kind) - 1


def more_text(untold: int) -> str:
    """For the end of a line."""
    return f" ({untold} more of this kind since the last line)" if untold else ""
