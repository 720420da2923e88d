# SPDX-License-Identifier: Apache-2.0
"""A control thread that ends by a fault leaves nobody waiting, and says so."""

from __future__ import annotations

import queue
import sys
import threading

import pytest

from sage_kv_connector.contract.failure import Code
from sage_kv_connector.engine.session.questions import Reply
from tests.engine.paged_side import MakeCore, Side, eventually


@pytest.fixture
def sides(make_core: MakeCore) -> tuple[Side, Side]:
    return Side(make_core(), 1), Side(make_core(), 2)


def die(side: Side) -> None:
    """As by a fault that no guard expects."""
    side.core._loop.submit(sys.exit, "planted")
    eventually(lambda: bool(side.core._loop.death))


def test_what_is_outstanding_fails_at_once(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.offer("t", [1])
    decode.offer("u", [2])
    decode.subscribe(prefill, "t", range(1), [1])
    eventually(lambda: prefill.core.is_streaming("t"))
    die(decode)
    outcome = decode.outcomes.get(timeout=2)
    assert outcome.failure is not None
    assert (outcome.failure.code, outcome.failure.aborted) == (Code.INTERNAL, False)
    assert "planted" in outcome.failure.detail
    released = decode.released.get(timeout=2)
    assert released.failure is not None and released.failure.code is Code.INTERNAL


def test_its_peers_hear_of_it_at_once(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.offer("t", [1])
    decode.subscribe(prefill, "t", range(1), [1])
    eventually(lambda: prefill.core.is_streaming("t"))
    die(prefill)
    outcome = decode.outcomes.get(timeout=2)
    assert outcome.failure is not None and outcome.failure.code is Code.INTERNAL


def test_what_comes_afterwards_ends_at_once(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    die(decode)
    decode.subscribe(prefill, "t", range(1), [1])
    decode.offer("u", [2])
    replies: queue.Queue[Reply] = queue.Queue()
    decode.core.ask(prefill.address(), "verb", b"", replies.put, 30.0)
    for failure in (decode.outcomes.get(timeout=2).failure, decode.released.get(timeout=2).failure):
        assert failure is not None and failure.code is Code.INTERNAL
    assert replies.get(timeout=2).code == Code.INTERNAL
    decode.core.withdraw(["u"], "nothing to do")


def test_the_engine_above_can_say_that_it_is_not_healthy(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    die(decode)
    prefill.core.check_alive()
    with pytest.raises(RuntimeError, match="planted"):
        decode.core.check_alive()
    decode.core.close()


def test_a_closed_engine_leaves_no_thread(sides: tuple[Side, Side]) -> None:
    for side in sides:
        threads = {thread for thread in threading.enumerate() if thread.name.startswith("sage-kvt")}
        assert side.core._loop._thread in threads
        side.core.close()
        assert not side.core._loop._thread.is_alive()
