# SPDX-License-Identifier: Apache-2.0
"""One request's transfers from several prefill ranks, as one outcome."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.transfer.consumer import Subscription


class GatheredOutcomes:
    """Waits until all ended: only then nothing writes into the pages any more.

    The first failure cancels the others. ``on_all`` is called once, with this. Control thread only.
    """

    def __init__(
        self,
        expected: int,
        on_all: Callable[[GatheredOutcomes], None],
        cancel: Callable[[Subscription], None],
    ) -> None:
        self._expected = expected
        self._on_all = on_all
        self._cancel = cancel
        self.handles: list[Subscription] = []
        self._outcomes: list[Outcome] = []

    def started(self, handle: Subscription) -> None:
        self.handles.append(handle)
        if any(not outcome.ok for outcome in self._outcomes):
            self._cancel(handle)

    def add(self, outcome: Outcome) -> None:
        first_failure = not outcome.ok and all(known.ok for known in self._outcomes)
        self._outcomes.append(outcome)
        if len(self._outcomes) == self._expected:
            self._on_all(self)
        elif first_failure:
            for handle in self.handles:
                self._cancel(handle)

    def outcome(self) -> Outcome:
        """The first failure, or the stats of all: bytes added up, times of the slowest."""
        failed = [outcome for outcome in self._outcomes if not outcome.ok]
        if failed:
            return failed[0]._replace(reached=all(outcome.reached for outcome in failed))
        stats = [outcome.stats for outcome in self._outcomes if outcome.stats is not None]
        together = msgspec.structs.replace(
            stats[0],
            nbytes=sum(one.nbytes for one in stats),
            wait_s=max(one.wait_s for one in stats),
            transfer_s=max(one.transfer_s for one in stats),
        )
        return Outcome(self._outcomes[0].transfer_id, together, "")
