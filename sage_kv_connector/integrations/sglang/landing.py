# SPDX-License-Identifier: Apache-2.0
"""One request's transfers on decode: pages from each prefill rank that holds them, and the metadata row.

It ended when all of them ended: only then nothing writes into SGLang's memory any more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.transfer.consumer import Subscription, Wanted
from sage_kv_connector.integrations.common.prefill_ranks import ReadPeer


class Landing:
    """``on_end(pages, error)`` comes once, on the control thread, with the pages' subscriptions and outcomes.

    It does not come after ``stop``: whoever stops a landing knows why.
    """

    def __init__(
        self, core: EngineCore, on_end: Callable[[list[tuple[Subscription, Outcome]], str], None]
    ) -> None:
        self._core = core
        self._on_end = on_end
        self._handles: list[Subscription] = []
        self._left = 0
        self._pages: list[tuple[Subscription, Outcome]] = []
        self._error = ""
        self._stopped = False
        self.ended = False

    def start(self, wanted: list[tuple[ReadPeer, Wanted]]) -> None:
        """Subscribe to all; those of pages have a selection."""
        self._left = len(wanted)
        for read, what in wanted:
            started: list[Subscription] = []
            self._core.subscribe(
                read.peer, what, partial(self._add, started), partial(self._started, started)
            )

    def stop(self) -> None:
        """End what is under way; returns when nothing writes into its memory any more."""
        self._stopped = True
        if not self.ended:
            self._core.cancel_all(self._handles)

    def _started(self, started: list[Subscription], handle: Subscription) -> None:
        started.append(handle)
        self._handles.append(handle)
        if self._error:
            self._core.cancel(handle)

    def _add(self, started: list[Subscription], outcome: Outcome) -> None:
        """Control thread. The first failure cancels the others."""
        self._left -= 1
        if outcome.ok and started[0].wanted.selection:
            self._pages.append((started[0], outcome))
        elif not outcome.ok and not self._error:
            self._error = outcome.error or "the transfer failed"
            for handle in self._handles:
                self._core.cancel(handle)
        if self._left == 0:
            self.ended = True
            if not self._stopped:
                self._on_end(self._pages, self._error)
