# SPDX-License-Identifier: Apache-2.0
"""One request's transfers on decode, from each prefill rank that holds its KV, as one.

It ended when all of them ended: only then nothing writes into the engine's memory any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import EngineCore, PagesTarget, Subscription, Wanted


class Landed(NamedTuple):
    """One of the transfers that arrived."""

    subscription: Subscription
    outcome: Outcome

    @property
    def has_pages(self) -> bool:
        return isinstance(self.subscription.wanted.target, PagesTarget)


class Landing:
    """``on_end(landing)`` comes once, on the control thread. It does not come after ``stop``.

    The first failure cancels the others.
    """

    def __init__(self, core: EngineCore, on_end: Callable[[Landing], None]) -> None:
        self._core = core
        self._on_end = on_end
        self._subscriptions: list[Subscription] = []
        self._left = 0
        self._failed: list[Outcome] = []
        self._cancelled = False
        self._stopped = False
        self.landed: list[Landed] = []
        self.ended = False

    def start(self, wanted: Sequence[tuple[PeerAddress, Wanted]]) -> None:
        """Subscribe to all; at least one."""
        self._left = len(wanted)
        for peer, what in wanted:
            started: list[Subscription] = []
            self._core.subscribe(peer, what, partial(self._add, started), partial(self._started, started))

    def cancel(self) -> None:
        """End what is under way; ``on_end`` comes when it ended. Any thread."""
        self._cancelled = True
        for subscription in list(self._subscriptions):
            self._core.cancel(subscription)

    def stop(self) -> None:
        """End what is under way; returns when nothing writes into its memory any more."""
        self._stopped = True
        if not self.ended:
            self._core.cancel_all(self._subscriptions)

    def outcome(self) -> Outcome:
        """Once it ended: a failure, or the stats of all, bytes added up, times and stages of the slowest.

        Of several failures the first, unless it is one of a peer that was not reached. What the first one ended may
        have been dialling: that is no such peer.
        """
        if self._failed:
            unreached = (one for one in self._failed if not one.reached and not one.aborted)
            return next(unreached, self._failed[0])
        stats = [one.outcome.stats for one in self.landed if one.outcome.stats is not None]
        together = msgspec.structs.replace(
            stats[0],
            nbytes=sum(one.nbytes for one in stats),
            wait_s=max(one.wait_s for one in stats),
            transfer_s=max(one.transfer_s for one in stats),
            peer=", ".join(dict.fromkeys(one.peer for one in stats)),
        )
        slowest = max((one.outcome.stages for one in self.landed), key=lambda s: sum(t for _, t in s))
        return Outcome(together.transfer_id, together, stages=slowest)

    def _started(self, started: list[Subscription], subscription: Subscription) -> None:
        started.append(subscription)
        self._subscriptions.append(subscription)
        if self._failed or self._cancelled:
            self._core.cancel(subscription)

    def _add(self, started: list[Subscription], outcome: Outcome) -> None:
        self._left -= 1
        if outcome.ok:
            self.landed.append(Landed(started[0], outcome))
        else:
            self._failed.append(outcome)
            if len(self._failed) == 1:
                for subscription in self._subscriptions:
                    self._core.cancel(subscription)
        if self._left == 0:
            self.ended = True
            if not self._stopped:
                self._on_end(self)
