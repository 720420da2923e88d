# SPDX-License-Identifier: Apache-2.0
"""What one peer may ask for, say and hold; what it does beyond that costs nobody else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.conversion import converters as converters_module
from sage_kv_connector.engine.conversion.staging import Lease, StagingArena
from sage_kv_connector.engine.core import EngineCore
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session import session as session_module
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer import early, producer
from sage_kv_connector.format.wire_format import WireFormat
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.paged_side import DIM, HEADS, LAYERS, MakeCore, Side, eventually


@pytest.fixture
def sides(make_core: MakeCore) -> tuple[Side, Side, Side]:
    """Prefill, a decode server that asks for too much, and another one."""
    return Side(make_core(), 1), Side(make_core(), 2), Side(make_core(), 3)


def session_of(side: Side, peer: Side) -> Session:
    found: list[Session] = []
    side.core._loop.submit(side.core.sessions.get, peer.address(), found.append)
    eventually(lambda: bool(found))
    assert isinstance(found[0], Session)
    return found[0]


def say(side: Side, peer: Side, messages: Sequence[m.Message]) -> None:
    session = session_of(side, peer)
    for message in messages:
        side.core._loop.submit(session.send, message)


def subscription(number: int) -> m.Subscribe:
    selection = (m.PageRuns(0, ((0, 1),)),)
    return m.Subscribe(f"t{number}", 1 + number, bytes(8), 4096, selection, True, False, 60_000)


def test_one_peer_leaves_room_for_others_to_wait(
    sides: tuple[Side, Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, greedy, other = sides
    monkeypatch.setattr(early, "MAX_EARLY_A_PEER", 3)
    say(greedy, prefill, [subscription(i) for i in range(10)])
    waiting = prefill.core._producer._early
    eventually(lambda: len(waiting) == 3)
    other.subscribe(prefill, "mine", range(1), [1])
    eventually(lambda: len(waiting) == 4)
    prefill.prefilled("mine", [2])
    assert other.outcomes.get(timeout=5).ok


def test_one_peer_gives_up_only_so_much_in_advance(
    sides: tuple[Side, Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, greedy, other = sides
    monkeypatch.setattr(early, "MAX_EARLY_A_PEER", 3)
    say(greedy, prefill, [m.Release(f"t{i}") for i in range(10)] + [m.Release("t0")] * 10)
    other.core.release(prefill.address(), "mine")
    unwanted = prefill.core._producer._early._unwanted
    eventually(lambda: "mine" in unwanted)
    assert sum(map(len, unwanted.values())) == 4
    prefill.prefilled("mine", [2])
    assert prefill.released.get(timeout=5).failure is None, "who needs nothing is not waited for"
    assert not prefill.core._producer._early._released_by["nobody"]


def test_what_was_taken_makes_room_again(
    sides: tuple[Side, Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode, _ = sides
    monkeypatch.setattr(early, "MAX_EARLY_A_PEER", 1)
    for number in range(3):
        decode.subscribe(prefill, f"t{number}", range(1), [1])
        eventually(lambda: len(prefill.core._producer._early) == 1)
        prefill.prefilled(f"t{number}", [2])
        assert decode.outcomes.get(timeout=5).ok
        decode.core.release(prefill.address(), f"u{number}")
        prefill.prefilled(f"u{number}", [3])
        for _ in range(2):
            assert prefill.released.get(timeout=5).failure is None
    assert not prefill.core._producer._early._of_peer
    assert not prefill.core._producer._early._released_by


def test_one_peer_is_served_only_so_often_at_a_time(
    sides: tuple[Side, Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, greedy, other = sides
    monkeypatch.setattr(producer, "MAX_STREAMS_A_PEER", 2)
    monkeypatch.setattr(producer, "BUSY_S", 0.0)
    for number in range(4):
        prefill.offer(f"t{number}", [number])
        greedy.subscribe(prefill, f"t{number}", range(1), [number])
    failed = [greedy.outcomes.get(timeout=5).failure for _ in range(2)]
    assert [failure.code for failure in failed if failure is not None] == [Code.BUSY] * 2
    prefill.offer("mine", [5])
    other.subscribe(prefill, "mine", range(1), [5])
    eventually(lambda: prefill.core.is_streaming("mine"))


def test_a_peer_that_talks_without_end_is_shown_out(
    sides: tuple[Side, Side, Side], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, greedy, other = sides
    monkeypatch.setattr(session_module, "MESSAGES_AT_ONCE", 50)
    monkeypatch.setattr(session_module, "MESSAGES_A_SECOND", 10)
    other.subscribe(prefill, "mine", range(1), [1])
    say(greedy, prefill, [m.Cancel("t", 1)] * 200)
    eventually(lambda: "messages a second" in caplog.text)
    eventually(lambda: len(prefill.core.sessions) == 1)
    prefill.prefilled("mine", [2])
    assert other.outcomes.get(timeout=5).ok


def test_formats_of_a_peer_take_only_so_much_memory(
    make_native_core: Callable[..., EngineCore], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = ConvertingSide(make_native_core, Shape(), 4)
    decode = ConvertingSide(make_native_core, Shape(page_size=8), 8)
    source = prefill.offer("t", [0, 1])
    prefill.ready("t", source, slice(None), 2)
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(32), [0, 1, 2, 3])
    assert decode.outcomes.get(timeout=5).ok
    converters = prefill.core._converters
    assert converters is not None
    session = next(iter(prefill.core.sessions._sessions.values()))
    monkeypatch.setattr(converters_module, "MAX_MADE", 4)
    chosen = [WireFormat(dtype) for dtype in ("fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2")]
    chosen += [
        WireFormat("int4", "token", 16),
        WireFormat("int4", "head", 16),
        WireFormat("int4", "channel", 16),
    ]
    for one in chosen:
        converters.to_wire(session, prefill.view.groups[0], 0, (one, one))
    assert len(converters._made[session]) == 4


class TestStaging:
    """A quarter of the memory is left to the others."""

    def request(self, arena: StagingArena, owner: str) -> Lease:
        return arena.request(1 << 16, lambda lease: None, owner)

    def test_no_peer_has_all_of_it(self) -> None:
        arena = StagingArena(1 << 18, lambda address, length: None)
        greedy = [self.request(arena, "greedy") for _ in range(5)]
        assert [bool(lease.address) for lease in greedy] == [True, True, True, False, False]
        other = self.request(arena, "other")
        assert other.address
        arena.release(greedy[0])
        assert greedy[3].address and not greedy[4].address

    def test_the_one_that_waits_longest_is_next(self) -> None:
        arena = StagingArena(1 << 18, lambda address, length: None)
        held = [self.request(arena, owner) for owner in "aabb"]
        first, second = self.request(arena, "c"), self.request(arena, "a")
        arena.release(held[0])
        assert first.address and not second.address

    def test_what_is_larger_than_the_share_goes_through_alone(self) -> None:
        arena = StagingArena(1 << 18, lambda address, length: None)
        large = arena.request(1 << 18, lambda lease: None, "one")
        assert large.address
        arena.release(large)
        assert arena.in_use == 0 and not arena._used


def test_the_clock_gives_messages_back() -> None:
    class Loop:
        pass

    session = Session(Loop(), 1.0, None, 0, None)  # type: ignore[arg-type]
    session._allowance = 0.5
    assert not session.may_say_more()
    time.sleep(0.01)
    assert session.may_say_more()


def test_who_asks_in_spite_of_the_verdict_gets_nothing(make_core: MakeCore) -> None:
    """Both sides see that KV can't move; a consumer that does not care is refused by the producer."""

    def schema(dtype: str) -> KVCacheSchema:
        return KVCacheSchema("e", "m", dtype, LAYERS, HEADS, 0, HEADS, DIM, ())

    prefill, decode = Side(make_core(schema=schema("bf16")), 1), Side(make_core(schema=schema("int8")), 2)
    prefill.prefilled("t1", [1])
    failed: list[m.Message] = []
    decode.core._consumer.on_failed = lambda session, message: failed.append(message)  # type: ignore[method-assign]
    say(decode, prefill, [subscription(1)])
    eventually(lambda: bool(failed))
    assert isinstance(failed[0], m.Failed) and "dtype" in failed[0].detail
    assert prefill.core.counters()["posts"] == 0 and prefill.released.empty()
