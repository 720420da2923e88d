# SPDX-License-Identifier: Apache-2.0
"""Bootstrap servers that clients name: none costs another's request anything, and a dead one costs its limit once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.integrations.common import bootstrap_queries
from sage_kv_connector.integrations.common.bootstrap_queries import BootstrapQueries, RecentFailures
from sage_kv_connector.integrations.common.prefill_ranks import PrefillEngine, PrefillRank

ENGINE = PrefillEngine((PrefillRank("e", 0, ("tcp://127.0.0.1:1",), "n"),))
PATIENCE_S = 5.0


class Asked:
    """A server that answers when it is let."""

    def __init__(self, answer: PrefillEngine | Exception = ENGINE) -> None:
        self.answer, self.times, self.go_on = answer, 0, threading.Event()

    def __call__(self) -> PrefillEngine:
        self.times += 1
        assert self.go_on.wait(PATIENCE_S)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def answers() -> queue.Queue[PrefillEngine | Reason]:
    return queue.Queue()


Answers = queue.Queue[PrefillEngine | Reason]


def test_many_that_want_the_same_ask_once(answers: Answers) -> None:
    queries, server = BootstrapQueries[PrefillEngine](PATIENCE_S), Asked()
    for _ in range(64):
        queries.ask("a", server, answers.put)
    server.go_on.set()
    assert [answers.get(timeout=PATIENCE_S) for _ in range(64)] == [ENGINE] * 64
    assert server.times == 1


def test_a_dead_server_keeps_nobody_from_a_living_one(answers: Answers) -> None:
    queries, dead, lives = BootstrapQueries[PrefillEngine](PATIENCE_S), Asked(), Asked()
    lives.go_on.set()
    for number in range(16):
        queries.ask(f"dead {number}", dead, answers.put)
    queries.ask("lives", lives, answers.put)
    assert answers.get(timeout=1) == ENGINE
    dead.go_on.set()


def test_a_limit_holds_whatever_the_resolver_does(answers: Answers) -> None:
    queries, stuck = BootstrapQueries[PrefillEngine](0.1), Asked()
    queries.ask("a", stuck, answers.put)
    answer = answers.get(timeout=PATIENCE_S)
    assert isinstance(answer, Reason) and answer.code is Code.BOOTSTRAP and "0.1 s" in answer.detail
    stuck.go_on.set()
    time.sleep(0.05)
    assert answers.empty(), "an answer that comes too late is nobody's"


def test_a_failure_is_known_for_a_moment(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, server = BootstrapQueries[PrefillEngine](PATIENCE_S), Asked(OSError("refused"))
    queries._failures = RecentFailures(0.2)
    server.go_on.set()
    for _ in range(2):
        queries.ask("a", server, answers.put)
        answer = answers.get(timeout=PATIENCE_S)
        assert isinstance(answer, Reason) and answer.detail == "refused"
    assert server.times == 1
    time.sleep(0.25)
    queries.ask("a", server, answers.put)
    answers.get(timeout=PATIENCE_S)
    assert server.times == 2


@pytest.mark.parametrize(
    "error", [RecursionError(), KeyError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "?")]
)
def test_any_exception_ends_the_request(answers: Answers, error: Exception) -> None:
    queries, server = BootstrapQueries[PrefillEngine](PATIENCE_S), Asked(error)
    server.go_on.set()
    queries.ask("a", server, answers.put)
    answer = answers.get(timeout=PATIENCE_S)
    assert isinstance(answer, Reason) and answer.code is Code.BOOTSTRAP and answer.detail


@pytest.mark.parametrize(
    ("bound", "asks"),
    [
        ("MAX_WAITING", lambda queries, server, use: [queries.ask("a", server, use) for _ in range(4)]),
        ("MAX_ASKED", lambda queries, server, use: [queries.ask(i, server, use) for i in range(4)]),
    ],
)
def test_what_is_too_much_is_refused_at_once(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, bound: str, asks: Callable[..., object]
) -> None:
    monkeypatch.setattr(bootstrap_queries, bound, 3)
    queries, server = BootstrapQueries[PrefillEngine](PATIENCE_S), Asked()
    asks(queries, server, answers.put)
    answer = answers.get(timeout=1)
    assert isinstance(answer, Reason) and answer.code is Code.BUSY
    server.go_on.set()
    assert [answers.get(timeout=PATIENCE_S) for _ in range(3)] == [ENGINE] * 3


def test_after_the_end_nobody_hears_anything(answers: Answers) -> None:
    queries, server = BootstrapQueries[PrefillEngine](PATIENCE_S), Asked()
    queries.ask("a", server, answers.put)
    queries.close()
    server.go_on.set()
    time.sleep(0.1)
    assert answers.empty()
