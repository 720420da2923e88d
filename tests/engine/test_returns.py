# SPDX-License-Identifier: Apache-2.0
"""Consumers that are told to come back, come back over a new session, or stay away for ever."""

from __future__ import annotations

import logging
import queue
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from sage_kv_connector.contract.failure import Code
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer import early, returns
from tests.engine.paged_side import MakeCore, Side, assert_pages_equal, eventually


@pytest.fixture
def sides(make_core: MakeCore) -> tuple[Side, Side]:
    prefill, decode = Side(make_core({"unmatched_timeout_s": 1.0}), 1), Side(make_core(), 2)
    prefill.core._producer._returns._wait_s = 1.0
    return prefill, decode


def streaming(prefill: Side, decode: Side) -> PagedSource:
    """Page 3 of prefill is on offer as "t", and decode waits for it in its page 1."""
    source = prefill.offer("t", [3])
    decode.subscribe(prefill, "t", range(1), [1])
    eventually(lambda: prefill.core.is_streaming("t"))
    return source


def cut(side: Side) -> None:
    for connection in list(side.backend()._ends):
        side.backend().close_connection(connection)


def stay_away(side: Side) -> None:
    """Its process hangs: it does nothing about its lost sessions."""
    side.core._consumer.on_closed = lambda session, why: None  # type: ignore[method-assign]


def test_a_load_without_a_byte_is_asked_for_again_over_a_new_session(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    source = streaming(prefill, decode)
    cut(prefill)
    prefill.ready("t", source, slice(None), 1)
    prefill.core.finish("t")
    assert decode.outcomes.get(timeout=5).ok
    assert_pages_equal(prefill, [3], decode, [1])
    assert prefill.released.get(timeout=5).ok, "its consumer was served, whatever became of its first session"


def test_who_came_back_is_not_taken_for_one_that_stays_away(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    source = streaming(prefill, decode)
    cut(prefill)
    eventually(lambda: len(decode.core.sessions._sessions) == 1 and prefill.core.is_streaming("t"))
    time.sleep(1.2)  # longer than it is waited for
    prefill.ready("t", source, slice(None), 1)
    prefill.core.finish("t")
    assert decode.outcomes.get(timeout=5).ok
    assert prefill.released.get(timeout=5).ok


def test_one_that_waits_for_its_prefill_comes_back_too(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.subscribe(prefill, "t", range(1), [1])
    eventually(lambda: len(prefill.core._producer._early) == 1)
    cut(prefill)
    eventually(lambda: len(prefill.core._producer._early) == 1)
    prefill.prefilled("t", [3])
    assert decode.outcomes.get(timeout=5).ok
    time.sleep(1.2)  # nobody is taken for one that stays away
    assert prefill.released.get(timeout=5).ok


def test_who_comes_back_before_its_loss_was_noticed_waits_once(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.core._producer.on_closed = lambda session, why: None  # type: ignore[method-assign]
    waiting = prefill.core._producer._early._waiting
    decode.subscribe(prefill, "t", range(1), [1])
    eventually(lambda: len(waiting) == 1)
    first = set(waiting)
    cut(decode)
    eventually(lambda: len(waiting) == 1 and first.isdisjoint(waiting))
    prefill.prefilled("t", [3])
    assert decode.outcomes.get(timeout=5).ok
    assert prefill.released.get(timeout=5).ok


def test_what_is_posted_to_a_connection_that_is_gone_is_no_end(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    source = streaming(prefill, decode)

    def ready_unheard() -> None:
        cut(prefill)
        prefill.ready("t", source, slice(None), 1)
        prefill.core._producer.pump("t")
        prefill.core._producer.finish("t")

    prefill.core._loop.submit(ready_unheard)
    assert decode.outcomes.get(timeout=5).ok
    assert_pages_equal(prefill, [3], decode, [1])
    assert prefill.released.get(timeout=5).ok


def test_a_window_on_a_connection_that_is_gone_is_no_end(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    for transfer_id in ("before", "t"):
        prefill.prefilled(transfer_id, [3])
    decode.subscribe(prefill, "before", range(1), [1])
    assert decode.outcomes.get(timeout=5).ok

    def subscribe_unheard() -> None:
        cut(decode)
        decode.subscribe(prefill, "t", range(1), [1])

    decode.core._loop.submit(subscribe_unheard)
    assert decode.outcomes.get(timeout=5).ok
    assert prefill.released.get(timeout=5).ok and prefill.released.get(timeout=5).ok


def test_who_stays_away_keeps_no_pages(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.backend().hold_posts = True
    prefill.prefilled("t", [3])
    decode.subscribe(prefill, "t", range(1), [1])
    eventually(lambda: prefill.backend().counters()["posts"] == 1)
    stay_away(decode)
    cut(prefill)
    outcome = prefill.released.get(timeout=5)
    assert outcome.failure is not None and outcome.failure.code is Code.SESSION_LOST


def test_who_is_away_when_the_offer_ends_is_counted_once(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    streaming(prefill, decode)
    stay_away(decode)
    cut(prefill)
    eventually(lambda: not prefill.core.is_streaming("t"))
    prefill.core.withdraw(["t"], "preempted")
    prefill.released.get(timeout=5)
    time.sleep(1.2)  # it would have been given up by now
    assert [(one.side, one.code) for one in prefill.core.snapshot().transfers] == [
        ("prefill", "session_lost")
    ]


def test_who_stays_away_takes_no_later_offer_of_the_same_id_along(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    streaming(prefill, decode)
    stay_away(decode)
    cut(prefill)
    prefill.core.withdraw(["t"], "preempted")
    prefill.released.get(timeout=5)
    prefill.prefilled("t", [4])
    time.sleep(1.2)
    decode.subscribe(prefill, "t", range(1), [2], finished=True)
    eventually(lambda: any(outcome.ok for outcome in list(decode.outcomes.queue)))
    assert prefill.released.get(timeout=5).ok


def test_what_was_withdrawn_is_forgotten_whole(
    sides: tuple[Side, Side], caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = sides
    prefill.offer("t", [3])
    started = decode.subscribe(prefill, "t", range(1), [1])
    eventually(lambda: prefill.core.is_streaming("t"))
    session = next(iter(decode.core.sessions._sessions.values()))
    with caplog.at_level(logging.ERROR):
        prefill.core.withdraw(["t"], "preempted")
        for message in (m.Cancel("t", started[0].generation), m.Grant(started[0].generation, 1, b"")):
            decode.core._loop.submit(session.send, message)
        assert not decode.outcomes.get(timeout=5).ok
        prefill.prefilled("u", [4])
        decode.subscribe(prefill, "u", range(1), [2])
        assert decode.outcomes.get(timeout=5).ok
    assert not caplog.records
    eventually(lambda: not prefill.core._producer._offers._consumers)


def test_who_waited_in_vain_is_not_waited_for(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.subscribe(prefill, "t", range(1), [1])
    outcome = decode.outcomes.get(timeout=5)
    assert outcome.failure is not None and outcome.failure.code is Code.UNKNOWN_TRANSFER
    prefill.prefilled("t", [3])
    outcome = prefill.released.get(timeout=5)
    assert outcome.failure is not None and outcome.failure.code is Code.DECLINED


def test_who_was_told_of_a_preemption_is_not_waited_for(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    streaming(prefill, decode)
    prefill.core.withdraw(["t"], "preempted")
    assert not decode.outcomes.get(timeout=5).ok
    prefill.released.get(timeout=5)
    prefill.prefilled("t", [3])
    assert not prefill.released.get(timeout=5).ok


def test_a_busy_peer_says_when_to_come_back(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = sides
    monkeypatch.setattr(early, "MAX_EARLY", 0)
    monkeypatch.setattr(early, "BUSY_S", 0.2)
    decode.subscribe(prefill, "t", range(1), [1])
    time.sleep(0.1)
    prefill.prefilled("t", [3])
    assert decode.outcomes.get(timeout=5).ok
    assert_pages_equal(prefill, [3], decode, [1])


def test_a_busy_peer_is_asked_again_over_the_session_of_a_question(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = sides
    monkeypatch.setattr(early, "MAX_EARLY", 0)
    monkeypatch.setattr(early, "BUSY_S", 0.1)
    # Prefill fetches from who asked it something, as the store does.
    sessions: queue.Queue[Session] = queue.Queue()
    decode.core.serve("session", lambda question, body: sessions.put(question.session))
    prefill.core.ask(decode.address(), "session", b"", lambda reply: None, 10.0)
    session = sessions.get(timeout=5)
    decode.subscribe(prefill, "t", range(1), [1], address=session)
    decode.subscribe(prefill, "never", range(1), [2], address=session)
    time.sleep(0.05)
    prefill.prefilled("t", [3])
    assert decode.outcomes.get(timeout=5).ok
    assert_pages_equal(prefill, [3], decode, [1])
    cut(decode)
    outcome = decode.outcomes.get(timeout=5)
    assert outcome.failure is not None and outcome.failure.code is Code.SESSION_LOST


def test_one_that_is_always_busy_is_given_up(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = sides
    monkeypatch.setattr(early, "MAX_EARLY", 0)
    monkeypatch.setattr(early, "BUSY_S", 0.01)
    decode.subscribe(prefill, "t", range(1), [1])
    outcome = decode.outcomes.get(timeout=5)
    assert outcome.failure is not None and outcome.failure.code is Code.BUSY


def test_who_is_cancelled_while_its_peer_is_busy_does_not_come_back(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = sides
    monkeypatch.setattr(early, "MAX_EARLY", 0)
    monkeypatch.setattr(early, "BUSY_S", 60.0)
    started = decode.subscribe(prefill, "t", range(1), [1])
    eventually(lambda: bool(started) and started[0].again is not None)
    decode.core.cancel(started[0])
    outcome = decode.outcomes.get(timeout=5)
    assert outcome.failure is not None and outcome.failure.code is Code.CANCELLED
    again = started[0].again
    assert again is not None and again.cancelled


@pytest.mark.parametrize("error", [BlockingIOError("its queue is full"), ValueError("too long")])
def test_who_can_be_told_nothing_loses_the_session(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    prefill, decode = sides
    streaming(prefill, decode)

    def refuse(connection: int, message: bytes) -> None:
        monkeypatch.undo()  # once
        raise error

    monkeypatch.setattr(prefill.backend(), "send", refuse)
    prefill.core.withdraw(["t"], "preempted")
    assert not decode.outcomes.get(timeout=5).ok, "the end of the session tells as well"
    prefill.released.get(timeout=5)


def test_no_more_are_waited_for_than_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(returns, "MAX_LOST", 2)
    loop: Any = SimpleNamespace(call_later=lambda *_: SimpleNamespace(cancel=lambda: None))
    waits, gone = returns.Returns(loop, 1.0), list[int]()
    for generation in (1, 2, 3):
        stream: Any = SimpleNamespace(generation=generation)
        waits.wait(stream, partial(gone.append, generation))
    assert gone == [3]
