# SPDX-License-Identifier: Apache-2.0
"""Questions on sessions: each ends exactly once, whatever the peer does."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

import pytest

from sage_kv_connector.contract.failure import Reason
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session import questions
from sage_kv_connector.engine.session.questions import Question, Reply
from sage_kv_connector.engine.session.session import Session

MakeCore = Callable[..., EngineCore]


def address(core: EngineCore) -> PeerAddress:
    return PeerAddress(core.engine_id, 0, core.addresses)


def ask(asker: EngineCore, asked: EngineCore, verb: str, body: bytes = b"", timeout_s: float = 5.0) -> Reply:
    replies: queue.Queue[Reply] = queue.Queue()
    asker.ask(address(asked), verb, body, replies.put, timeout_s)
    reply = replies.get(timeout=timeout_s + 5)
    time.sleep(0.01)
    assert replies.empty(), "a question ends once"
    return reply


@pytest.fixture
def cores(make_core: MakeCore) -> tuple[EngineCore, EngineCore]:
    return make_core({"peer_timeout_s": 1.0}), make_core()


def test_an_answer_comes_back_on_both_ways(cores: tuple[EngineCore, EngineCore]) -> None:
    first, second = cores
    for core in cores:
        core.serve("turn", lambda question, body: question.answer(body[::-1]))
    assert ask(first, second, "turn", b"abc") == Reply("", "", b"cba")
    assert ask(second, first, "turn", b"x" * m.MAX_BODY).body == b"x" * m.MAX_BODY


def test_answers_may_come_later_and_in_another_order(cores: tuple[EngineCore, EngineCore]) -> None:
    asker, asked = cores
    waiting: queue.Queue[tuple[Question, bytes]] = queue.Queue()
    asked.serve("later", lambda question, body: waiting.put((question, body)))
    replies: dict[int, queue.Queue[Reply]] = {i: queue.Queue() for i in range(3)}
    for i, box in replies.items():
        asker.ask(address(asked), "later", bytes([i]), box.put, 5.0)
    open_ones = [waiting.get(timeout=5) for _ in replies]
    for question, body in reversed(open_ones):
        asked._loop.submit(question.answer, body * 2)
    assert [box.get(timeout=5).body for box in replies.values()] == [bytes([i, i]) for i in range(3)]


def test_a_second_answer_is_nothing(cores: tuple[EngineCore, EngineCore]) -> None:
    def twice(question: Question, body: bytes) -> None:
        question.answer(b"first")
        question.answer(b"second")
        question.refuse("failed", "third")

    cores[1].serve("twice", twice)
    assert ask(*cores, "twice").body == b"first"


def test_an_unknown_verb_is_named_with_what_is_served(cores: tuple[EngineCore, EngineCore]) -> None:
    cores[1].serve("known", lambda question, body: question.answer(b""))
    reply = ask(*cores, "other")
    assert not reply.ok and reply.code == "unknown_verb"
    assert "'other'" in reply.detail and "known" in reply.detail


def test_a_handler_that_breaks_is_an_answer_and_the_session_lives(
    cores: tuple[EngineCore, EngineCore],
) -> None:
    def broken(question: Question, body: bytes) -> None:
        raise RuntimeError("secret detail")

    cores[1].serve("broken", broken)
    cores[1].serve("fine", lambda question, body: question.answer(b"ok"))
    reply = ask(*cores, "broken")
    assert reply.code == "failed" and "secret detail" not in reply.detail
    assert ask(*cores, "fine").body == b"ok"


def test_a_question_that_nobody_answers_ends_in_time(cores: tuple[EngineCore, EngineCore]) -> None:
    late: queue.Queue[Question] = queue.Queue()
    cores[1].serve("silent", lambda question, body: late.put(question))
    cores[1].serve("fine", lambda question, body: question.answer(b"ok"))
    assert ask(*cores, "fine").ok, "the session is open, so that the next question gets there in time"
    begun = time.monotonic()
    assert ask(*cores, "silent", timeout_s=0.2).code == "late"
    assert time.monotonic() - begun < 2
    question = late.get(timeout=5)
    cores[1]._loop.submit(question.answer, b"too late")
    assert ask(*cores, "fine").body == b"ok"
    assert cores[0].counters()["questions"] == cores[1].counters()["questions"] == 0


def test_nobody_there_and_a_lost_session_are_answers(make_core: MakeCore) -> None:
    asker, asked = make_core(), make_core()
    nowhere: queue.Queue[Reply] = queue.Queue()
    asker.ask(PeerAddress("x", 0, ("memory://none",)), "verb", b"", nowhere.put, 5.0)
    assert nowhere.get(timeout=5).code == "unreachable"
    asked.serve("silent", lambda question, body: None)
    lost: queue.Queue[Reply] = queue.Queue()
    asker.ask(address(asked), "silent", b"", lost.put, 30.0)
    until = time.monotonic() + 5
    while not asked.counters()["questions"]:
        assert time.monotonic() < until
    for end in list(asked.backends["memory"]._ends):  # type: ignore[attr-defined]
        asked.backends["memory"].close_connection(end)
    assert lost.get(timeout=5).code == "lost"
    until = time.monotonic() + 5
    while asked.counters()["questions"]:
        assert time.monotonic() < until, "who is gone gets no answer"


def test_closing_ends_what_is_open(make_core: MakeCore) -> None:
    asker, asked = make_core(), make_core()
    asked.serve("silent", lambda question, body: None)
    replies: queue.Queue[Reply] = queue.Queue()
    asker.ask(address(asked), "silent", b"", replies.put, 30.0)
    asker.close()
    assert replies.get(timeout=5).code in ("shutting_down", "lost")


def test_too_many_open_questions_are_refused(
    cores: tuple[EngineCore, EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "MAX_UNANSWERED", 2)
    asker, asked = cores
    asked.serve("silent", lambda question, body: None)
    replies: queue.Queue[Reply] = queue.Queue()
    for _ in range(3):
        asker.ask(address(asked), "silent", b"", replies.put, 30.0)
    assert replies.get(timeout=5).code == "busy"


@pytest.mark.parametrize(("verb", "body"), [("", b""), ("v" * 65, b""), ("v", b"x" * (m.MAX_BODY + 1))])
def test_what_no_message_can_hold_is_refused_here(
    cores: tuple[EngineCore, EngineCore], verb: str, body: bytes
) -> None:
    with pytest.raises(ValueError, match="a verb has 1 to 64"):
        cores[0].ask(address(cores[1]), verb, body, lambda reply: None, 1.0)


def test_a_number_that_is_open_ends_the_session(cores: tuple[EngineCore, EngineCore]) -> None:
    asker, asked = cores
    asked.serve("silent", lambda question, body: None)
    replies: queue.Queue[Reply] = queue.Queue()
    asker.ask(address(asked), "silent", b"", replies.put, 30.0)

    def again(session: Session | Reason) -> None:
        assert isinstance(session, Session)
        session.send(m.Ask(1, "silent", b""))

    asker._loop.submit(asker.sessions.get, address(asked), again)
    assert replies.get(timeout=5).code == "lost"
