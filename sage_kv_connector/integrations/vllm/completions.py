# SPDX-License-Identifier: Apache-2.0
"""What ended since the last step: filled on the transport's control thread, emptied on vLLM's."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from typing import NamedTuple

from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.integrations.vllm.metadata import VLLM_HOLDS, Finished


class Ended(NamedTuple):
    """Requests sent that vLLM keeps, holds of others, and requests received → how that ended."""

    sent: set[str]
    released: set[int]
    received: dict[str, Outcome]


class Completions:
    """Completions since the last step; filled on the control thread, emptied on vLLM's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._sent: set[str] = set()
        self._released: set[int] = set()
        self._received: dict[str, Outcome] = {}

    def add_sent(self, request_id: str, hold: int) -> None:
        """Nothing reads the pages of this prefill any more; ``hold``: who keeps them, as its ``Finished`` says."""
        with self._lock:
            if hold == VLLM_HOLDS:
                self._sent.add(request_id)
            else:
                self._released.add(hold)
        self._arrived.set()

    def add_received(self, request_id: str, outcome: Outcome) -> None:
        with self._lock:
            self._received[request_id] = outcome
        self._arrived.set()

    def drop_received(self, request_ids: Collection[str]) -> None:
        """What these loads came to counts no more."""
        with self._lock:
            for request_id in request_ids:
                self._received.pop(request_id, None)

    def wait(self, timeout_s: float) -> None:
        self._arrived.wait(timeout_s)

    def take(self) -> Ended:
        """Empties it."""
        with self._lock:
            self._arrived.clear()
            ended = Ended(self._sent, self._released, self._received)
            self._sent, self._released, self._received = set(), set(), {}
        return ended


class StepResults(NamedTuple):
    """What one step reports to vLLM, and of ``released`` holds to the scheduler's half."""

    sent: set[str]
    released: set[int]
    received: set[str]
    failed: set[str]
    invalid_blocks: set[int]

    def and_also(self, other: StepResults) -> StepResults:
        return StepResults(
            self.sent | other.sent,
            self.released | other.released,
            self.received | other.received,
            self.failed | other.failed,
            self.invalid_blocks | other.invalid_blocks,
        )


NOTHING = StepResults(set(), set(), set(), set(), set())


def not_on_offer(prefills: Iterable[Finished]) -> StepResults:
    """What is reported of finished prefills that nobody can fetch here."""
    completions = Completions()
    for finished in prefills:
        completions.add_sent(finished.request_id, finished.hold)
    ended = completions.take()
    return NOTHING._replace(sent=ended.sent, released=ended.released)
