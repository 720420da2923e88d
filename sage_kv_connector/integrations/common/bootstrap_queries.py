# SPDX-License-Identifier: Apache-2.0
"""Questions to bootstrap servers that clients name: off the engine's threads, bounded, and none waits for another's.

Each server is asked by one thread at a time, whoever wants to know waits for its answer, for a limited time. What
failed is known for a moment, so that a dead address costs its limit once and not once a request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

from sage_kv_connector.contract.failure import Code, Reason

#: Servers that are asked at the same time, and requests that wait for one of them.
MAX_ASKED, MAX_WAITING = 32, 1024
#: A failure is known for so long.
REMEMBERED_S = 2.0

T = TypeVar("T")


class _Asking(NamedTuple, Generic[T]):
    waiting: list[Callable[[T | Reason], None]]
    timer: threading.Timer


class RecentFailures:
    """Why something failed a moment ago. Any thread."""

    def __init__(self, remembered_s: float = REMEMBERED_S) -> None:
        self._remembered_s = remembered_s
        self._failed: dict[Hashable, tuple[float, Reason]] = {}

    def get(self, place: Hashable) -> Reason | None:
        known = self._failed.get(place)
        return known[1] if known is not None and time.monotonic() < known[0] else None

    def remember(self, place: Hashable, why: Reason) -> None:
        now = time.monotonic()
        self._failed = {key: known for key, known in self._failed.items() if now < known[0]}
        if len(self._failed) < MAX_WAITING:
            self._failed[place] = now + self._remembered_s, why


class BootstrapQueries(Generic[T]):
    """``limit_s``: of one question, whatever the resolver and the server do."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._changing = threading.Lock()
        self._asking: dict[Hashable, _Asking[T]] = {}
        self._threads = 0
        self._failures = RecentFailures()

    def __len__(self) -> int:
        """Servers that are being asked."""
        return len(self._asking)

    def ask(self, place: Hashable, query: Callable[[], T], use: Callable[[T | Reason], None]) -> None:
        """Call ``use`` once, on any thread, with what ``query`` returns, or with why it does not.

        Another one for the same ``place`` shares it.
        """
        with self._changing:
            why = self._failures.get(place)
            known = self._asking.get(place)
            if why is None and known is not None:
                if len(known.waiting) < MAX_WAITING:
                    known.waiting.append(use)
                    return
                why = Reason(Code.BUSY, f"{MAX_WAITING} requests wait for this bootstrap server")
            if why is None and self._threads >= MAX_ASKED:
                why = Reason(Code.BUSY, f"{MAX_ASKED} other bootstrap servers are being asked")
            if why is None:
                self._begin(place, query, use)
                return
        use(why)

    def close(self) -> None:
        """Nobody hears an answer any more."""
        with self._changing:
            asking, self._asking = self._asking, {}
        for one in asking.values():
            one.timer.cancel()

    def _begin(self, place: Hashable, query: Callable[[], T], use: Callable[[T | Reason], None]) -> None:
        late = Reason(Code.BOOTSTRAP, f"the bootstrap server did not answer within {self._limit_s:g} s")
        timer = threading.Timer(self._limit_s, self._settle, (place, late))
        timer.daemon = True
        self._asking[place] = _Asking([use], timer)
        self._threads += 1
        threading.Thread(
            target=self._ask, args=(place, query), name="sage-kvt-bootstrap-query", daemon=True
        ).start()
        timer.start()

    def _ask(self, place: Hashable, query: Callable[[], T]) -> None:
        try:
            found: T | Reason = query()
        except Exception as error:  # whatever a client may have named, its request must end
            found = Reason(Code.BOOTSTRAP, str(error) or type(error).__name__)
        with self._changing:
            self._threads -= 1
        self._settle(place, found)

    def _settle(self, place: Hashable, found: T | Reason) -> None:
        with self._changing:
            asking = self._asking.pop(place, None)
            if isinstance(found, Reason):
                self._failures.remember(place, found)
        if asking is None:
            return
        asking.timer.cancel()
        for use in asking.waiting:
            use(found)
