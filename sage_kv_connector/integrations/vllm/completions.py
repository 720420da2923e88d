# SPDX-License-Identifier: Apache-2.0
"""What ended since the last step: filled on the transport's control thread, emptied on vLLM's."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import NamedTuple

from sage_kv_connector.contract.plan import Outcome


class Completions:
    """Completions since the last step; filled on the control thread, emptied on vLLM's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._sent: set[str] = set()
        self._received: dict[str, Outcome] = {}

    def add_sent(self, request_id: str) -> None:
        with self._lock:
            self._sent.add(request_id)
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

    def take(self) -> tuple[set[str], dict[str, Outcome]]:
        """(requests sent, requests received → how that ended)."""
        with self._lock:
            self._arrived.clear()
            sent, self._sent = self._sent, set()
            received, self._received = self._received, {}
        return sent, received


class StepResults(NamedTuple):
    """What one step reports to vLLM."""

    sent: set[str]
    received: set[str]
    failed: set[str]
    invalid_blocks: set[int]

    def and_also(self, other: StepResults) -> StepResults:
        return StepResults(
            self.sent | other.sent,
            self.received | other.received,
            self.failed | other.failed,
            self.invalid_blocks | other.invalid_blocks,
        )


NOTHING = StepResults(set(), set(), set(), set())
