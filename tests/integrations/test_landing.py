# SPDX-License-Identifier: Apache-2.0
"""A request's transfers on decode end together, and say why once."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.failure import Code, Failure, Stage
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.pages.target import MemoryTarget, PagesTarget
from sage_kv_connector.engine.transfer.subscription import Subscription, Wanted
from sage_kv_connector.integrations.common.landing import Landing

PEER = PeerAddress("e", 0, ())
STATS = TransferStats("t", 8, 0.0, 0.0, "shm", "direct", False)


def failed(code: Code, stage: Stage = Stage.MOVE) -> Outcome:
    return Outcome("t", None, Failure(code, stage, "here"))


class Core:
    """Keeps what was asked for; the test ends it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.cancelled: list[str] = []

    def subscribe(self, peer: PeerAddress, wanted: Wanted, on_outcome: Any, on_started: Any) -> None:
        self.asked.append(on_outcome)
        on_started(Subscription(wanted, on_outcome))

    def cancel(self, handle: Subscription) -> None:
        self.cancelled.append(handle.wanted.transfer_id)

    def cancel_all(self, handles: list[Subscription]) -> None:
        for on_outcome in self.asked:
            on_outcome(failed(Code.CANCELLED))


def landing(core: Core) -> tuple[Landing, list[tuple[int, str]]]:
    """A landing of pages and metadata; what it said is (number of pages' outcomes, error)."""
    said: list[tuple[int, str]] = []

    def ended(landing: Landing) -> None:
        said.append((sum(one.has_pages for one in landing.landed), landing.outcome().error))

    made = Landing(cast(EngineCore, core), ended)
    pages = Wanted("pages", PagesTarget(KVCacheView(()), ()), False, 1.0)
    row = MemoryTarget(np.zeros((0, 2), dtype=np.uint64))
    made.start([(PEER, pages), (PEER, Wanted("pages-aux", row, False, 1.0))])
    return made, said


def test_it_lands_when_pages_and_metadata_landed() -> None:
    core = Core()
    made, said = landing(core)
    core.asked[1](Outcome("t", STATS))
    assert not said and not made.ended
    core.asked[0](Outcome("t", STATS))
    assert said == [(1, "")] and made.ended


def test_the_first_failure_is_the_reason_and_ends_the_rest() -> None:
    core = Core()
    _, said = landing(core)
    core.asked[0](failed(Code.SESSION_LOST))
    assert "pages-aux" in core.cancelled and not said
    core.asked[1](failed(Code.CANCELLED))
    assert said == [(0, "session_lost: here")]


def test_a_peer_that_was_not_reached_is_the_reason_whatever_ended_first() -> None:
    """Its ranks are looked up anew then."""
    core = Core()
    made, said = landing(core)
    core.asked[0](failed(Code.CANCELLED))
    core.asked[1](failed(Code.UNREACHABLE, Stage.CONNECT))
    assert said == [(0, "unreachable: here")] and not made.outcome().reached


def test_what_was_given_up_while_it_dialled_again_is_not_the_reason() -> None:
    core = Core()
    made, said = landing(core)
    core.asked[0](failed(Code.SESSION_LOST))
    given_up = Failure(Code.CANCELLED, Stage.CONNECT, "nobody here wants it any more", aborted=True)
    core.asked[1](Outcome("t", None, given_up))
    assert said == [(0, "session_lost: here")] and not made.outcome().aborted


def test_who_stops_it_knows_why() -> None:
    core = Core()
    made, said = landing(core)
    made.stop()
    assert made.ended and not said
