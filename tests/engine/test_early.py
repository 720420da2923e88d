# SPDX-License-Identifier: Apache-2.0
"""What came before its offer, step by step: who waits, for how long, and what is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.prompt import UNBOUND, Prompt, PromptDigest
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.pages.memory import MemorySource
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer import early as early_module
from sage_kv_connector.engine.transfer.early import SIBLING_S, Early
from sage_kv_connector.engine.transfer.offer import Offer, OfferTerms, Stream

TIMEOUT_S = 30.0
ONE, OTHER = Prompt([1, 2, 3]), Prompt([4, 5, 6])


class Loop:
    """Keeps what it is to call later."""

    def __init__(self) -> None:
        self.timers: list[SimpleNamespace] = []

    def call_later(self, delay_s: float, function: Callable[..., object], *arguments: Any) -> SimpleNamespace:
        timer = SimpleNamespace(delay_s=delay_s, fire=lambda: function(*arguments))
        timer.cancel = lambda: self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def delays(self) -> list[float]:
        return sorted(timer.delay_s for timer in self.timers)


class Wire:
    """A session: who holds it, and what was said."""

    def __init__(self, engine_id: str) -> None:
        self.peer = SimpleNamespace(engine_id=engine_id, rank=0)
        self.verdict = SimpleNamespace(refusal=None, must_convert=False)
        self.holders = 0
        self.said: list[m.Message] = []

    def hold(self) -> None:
        self.holders += 1

    def drop(self) -> None:
        self.holders -= 1

    def send(self, message: m.Message) -> None:
        self.said.append(message)


class Waiting:
    """``Early`` over a loop that does nothing by itself."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.late: list[tuple[int, Reason]] = []
        self.early = Early(cast(ControlLoop, self.loop), TIMEOUT_S, self._late)
        self.generations = iter(range(1, 10_000))

    def _late(self, stream: Stream, why: Reason) -> None:
        self.late.append((stream.generation, why))

    def add(self, wire: Wire, transfer_id: str = "t", prompt: PromptDigest = UNBOUND, **more: Any) -> Stream:
        difference = more.pop("difference", None)
        request = m.Subscribe(
            transfer_id, next(self.generations), b"", 8, (), True, more.pop("finished", False),
            more.pop("timeout_ms", 60_000), prompt=prompt, **more,
        )  # fmt: skip
        stream = Stream(cast(Session, wire), request)
        self.early.add(stream, difference)
        return stream


def offer(transfer_id: str = "t", prompt: Prompt | None = None, family: str = "") -> Offer:
    terms = OfferTerms(prompt=prompt, family=family)
    return Offer(transfer_id, cast(MemorySource, None), lambda outcome: None, terms)


@pytest.fixture
def waiting() -> Waiting:
    return Waiting()


@pytest.fixture
def wire() -> Wire:
    return Wire("a")


def failed(wire: Wire) -> list[m.Failed]:
    return [message for message in wire.said if isinstance(message, m.Failed)]


def test_one_that_nobody_offered_waits_and_holds_its_session(waiting: Waiting, wire: Wire) -> None:
    stream = waiting.add(wire)
    assert (len(waiting.early), wire.holders, waiting.loop.delays()) == (1, 1, [TIMEOUT_S])
    waiting.loop.timers[0].fire()
    assert [generation for generation, _ in waiting.late] == [stream.generation]
    assert (len(waiting.early), wire.holders, wire.said) == (0, 0, [])


def test_it_waits_no_longer_than_its_consumer(waiting: Waiting, wire: Wire) -> None:
    waiting.add(wire, timeout_ms=1500)
    assert waiting.loop.delays() == [1.5]


def test_its_offer_takes_it_with_its_hold_and_its_timer(waiting: Waiting, wire: Wire) -> None:
    stream = waiting.add(wire)
    assert waiting.early.fitting(offer()) == [stream]
    assert waiting.early.fitting(offer("u")) == []
    waiting.early.take(stream)
    assert (len(waiting.early), wire.holders, len(waiting.loop.timers)) == (0, 1, 1)
    stream.stop()
    assert (wire.holders, waiting.loop.timers) == (0, [])


def test_an_offer_of_another_prompt_is_not_for_it_and_shortens_its_wait(waiting: Waiting, wire: Wire) -> None:
    mine = waiting.add(wire, prompt=ONE.whole)
    waiting.add(wire, prompt=OTHER.whole)
    assert waiting.early.fitting(offer(prompt=ONE)) == [mine]
    assert waiting.loop.delays() == [SIBLING_S, TIMEOUT_S]
    # Under another name, and of the same prompt.
    assert waiting.early.fitting(offer("u", prompt=ONE)) == [mine]
    assert waiting.early.fitting(offer("u", prompt=OTHER, family="t"))[0].request.prompt == OTHER.whole


def test_a_wait_gets_shorter_and_never_longer(waiting: Waiting, wire: Wire) -> None:
    stream = waiting.add(wire, timeout_ms=200)
    waiting.early.leave_to_siblings(stream)
    assert waiting.loop.delays() == [0.2]
    other = waiting.add(wire)
    waiting.early.leave_to_siblings(other)
    waiting.early.leave_to_siblings(other)
    assert waiting.loop.delays() == [0.2, SIBLING_S]
    waiting.loop.timers[-1].fire()
    assert "as many as were expected" in waiting.late[0][1].detail


def test_who_knows_that_prefill_is_over_waits_for_nothing(waiting: Waiting, wire: Wire) -> None:
    waiting.add(wire, finished=True)
    waiting.add(wire, finished=True, difference=Reason(Code.PROMPT, "another prompt"))
    assert [message.code for message in failed(wire)] == [Code.UNKNOWN_TRANSFER, Code.PROMPT]
    assert (len(waiting.early), wire.holders, waiting.loop.timers) == (0, 0, [])


def test_what_is_gone_is_said_to_who_comes_late(waiting: Waiting, wire: Wire) -> None:
    waiting.early.gone(offer(family="f"), "its lease expired")
    waiting.add(wire, finished=True)
    waiting.add(wire, "f", finished=True)
    assert [message.detail for message in failed(wire)] == ["its lease expired"] * 2
    waiting.add(wire)  # another prompt of the request may come
    assert waiting.loop.delays() == [SIBLING_S]
    waiting.early.take_releases(offer())
    waiting.add(wire, finished=True)
    assert "never offered" in failed(wire)[-1].detail, "it was offered again since"


def test_what_was_given_up_is_said_at_once_until_it_is_offered(waiting: Waiting, wire: Wire) -> None:
    mine, other = waiting.add(wire), waiting.add(wire, "u")
    waiting.early.give_up("t", Reason(Code.WITHDRAWN, "aborted"))
    assert [message.generation for message in failed(wire)] == [mine.generation]
    assert wire.holders == 1 and len(waiting.early) == 1
    waiting.add(wire)
    assert [message.code for message in failed(wire)] == [Code.WITHDRAWN] * 2
    waiting.early.take_releases(offer())
    waiting.add(wire)
    assert len(waiting.early) == 2
    waiting.early.close(Reason(Code.SHUTTING_DOWN, "the end"))
    assert [message.code for message in failed(wire)[2:]] == [Code.SHUTTING_DOWN] * 2
    assert (len(waiting.early), wire.holders, waiting.loop.timers, other.timer) == (0, 0, [], None)


def test_releases_are_kept_for_the_offer_that_they_mean(waiting: Waiting) -> None:
    of_one, of_other = m.Release("t", 1, "", ONE.whole), m.Release("t", 1, "", OTHER.whole)
    for release in (of_one, of_other, m.Release("u")):
        waiting.early.remember(release, "a")
    assert waiting.early.take_releases(offer(prompt=OTHER)) == [of_other]
    assert waiting.early.take_releases(offer(prompt=OTHER)) == []
    assert waiting.early.take_releases(offer(prompt=ONE)) == [of_one]
    assert waiting.early.take_releases(offer("x", family="u")) == [m.Release("u")]
    assert not waiting.early._released_by and not waiting.early._unwanted


def test_one_that_stops_to_wait_leaves_a_release(waiting: Waiting, wire: Wire) -> None:
    stream = waiting.add(wire)
    waiting.early.cancel(cast(Session, Wire("b")), stream.generation)
    assert len(waiting.early) == 1, "that was another session"
    waiting.early.cancel(cast(Session, wire), stream.generation)
    waiting.early.cancel(cast(Session, wire), stream.generation)
    assert (len(waiting.early), wire.holders, waiting.loop.timers) == (0, 0, [])
    assert [release.transfer_id for release in waiting.early.take_releases(offer())] == ["t"]


def test_those_of_a_lost_session_wait_no_more(waiting: Waiting, wire: Wire) -> None:
    mine, theirs = waiting.add(wire), waiting.add(Wire("b"))
    assert waiting.early.take_lost(cast(Session, wire)) == [mine]
    assert len(waiting.early) == 1 and wire.holders == 0
    again = Wire("b")
    waiting.early.replaced(cast(Session, Wire("c")), theirs.generation)
    assert len(waiting.early) == 1, "another engine replaces nothing of this one's"
    waiting.early.replaced(cast(Session, again), theirs.generation)
    assert len(waiting.early) == 0


def test_each_peer_leaves_room_for_the_others(
    waiting: Waiting, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early_module, "MAX_EARLY_A_PEER", 2)
    monkeypatch.setattr(early_module, "MAX_EARLY", 3)
    other, third = Wire("b"), Wire("c")
    streams = [waiting.add(wire) for _ in range(3)]
    assert [(message.code, message.again_ms) for message in failed(wire)] == [(Code.BUSY, 1000)]
    waiting.add(other)
    assert not other.said
    waiting.add(third)
    assert [message.code for message in failed(third)] == [Code.BUSY]
    waiting.early.cancel(cast(Session, wire), streams[0].generation)
    waiting.add(wire)
    assert len(failed(wire)) == 1, "one of its places is free again"
    for stream in list(waiting.early._waiting.values()):
        waiting.early.take(stream)
    assert not waiting.early._of_peer


def test_releases_are_bounded_by_peer_and_by_id(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_module, "MAX_EARLY_A_PEER", 2)
    monkeypatch.setattr(early_module, "MAX_EARLY", 3)
    for name in ("t", "u", "v"):
        waiting.early.remember(m.Release(name), "a")
    assert list(waiting.early._unwanted) == ["t", "u"]
    for name in ("v", "w"):
        waiting.early.remember(m.Release(name), "b")
    assert list(waiting.early._unwanted) == ["u", "v", "w"], "the oldest is forgotten"
    assert dict(waiting.early._released_by) == {"a": 1, "b": 2}


def test_what_is_known_of_ids_is_bounded(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_module, "MAX_EARLY", 2)
    for name in ("t", "u", "t", "v"):
        waiting.early.give_up(name, Reason(Code.WITHDRAWN, "aborted"))
        waiting.early.gone(offer(name), "gone")
    assert list(waiting.early._given_up) == list(waiting.early._gone) == ["t", "v"]
