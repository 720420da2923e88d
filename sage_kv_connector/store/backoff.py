# SPDX-License-Identifier: Apache-2.0
"""When to ask a server again that failed: after a short pause, longer each time, until it answers once."""

from __future__ import annotations

import threading
import time

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Backoff:
    """Thread-safe."""

    def __init__(self, first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._lock = threading.Lock()
        self._until = 0.0
        self._pause_s = first_s

    @property
    def pausing(self) -> bool:
        return time.monotonic() < self._until

    def failed(self) -> float:
        """Begin a pause; returns its length in seconds. Failures within a pause, asked for before it, are one."""
        with self._lock:
            if self.pausing:
                return self._until - time.monotonic()
            pause = self._pause_s
            self._until = time.monotonic() + pause
            self._pause_s = min(2 * pause, self._longest_s)
            return pause

    def worked(self) -> None:
        with self._lock:
            self._until, self._pause_s = 0.0, self._first_s
