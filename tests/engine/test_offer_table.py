# SPDX-License-Identifier: Apache-2.0
"""What the table of offers counts and forgets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from sage_kv_connector.engine.pages.memory import MemorySource
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer import offer_table
from sage_kv_connector.engine.transfer.offer import NO_TERMS, Offer
from sage_kv_connector.engine.transfer.offer_table import OfferTable


def session(engine_id: str) -> Session:
    return cast(Session, SimpleNamespace(peer=SimpleNamespace(engine_id=engine_id, rank=0)))


def offer(transfer_id: str) -> Offer:
    return Offer(transfer_id, cast(MemorySource, None), lambda outcome: None, NO_TERMS)


@pytest.fixture
def table() -> OfferTable:
    return OfferTable()


def test_a_peers_streams_are_counted_over_all_its_sessions(table: OfferTable) -> None:
    first, second, other = session("a"), session("a"), session("b")
    one = offer("t")
    for generation, of in enumerate((first, second, other), 1):
        table.begin(of, generation, one)
    assert [table.streams_of(("a", 0)), table.streams_of(("b", 0))] == [2, 1]
    table.end(first, 1)
    table.end(first, 1)
    assert table.streams_of(("a", 0)) == 1
    assert table.of_consumer(first, 1) is None and table.of_consumer(second, 2) is one
    table.end(second, 2)
    table.end(other, 3)
    assert table.streams_of(("a", 0)) == 0
    assert not table._of_peer, "who has none is forgotten"


def test_a_generation_that_ended_is_known_for_a_while(
    table: OfferTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offer_table, "MAX_ENDED", 2)
    peer, one = session("a"), offer("t")
    for generation in (1, 2, 3):
        table.begin(peer, generation, one)
        assert not table.has_ended(peer, generation)
        table.end(peer, generation)
    assert [table.has_ended(peer, generation) for generation in (1, 2, 3)] == [False, True, True]
