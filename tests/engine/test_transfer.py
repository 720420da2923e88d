# SPDX-License-Identifier: Apache-2.0
"""Producer and consumer over the in-process backend: who is told what, and when memory is free."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sage_kv_connector.backends.base import Status
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.pages.layout import NULL_PAGE
from sage_kv_connector.engine.pages.memory import MemorySource
from sage_kv_connector.engine.pages.target import MemoryTarget
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.transfer.subscription import Wanted
from tests.engine.paged_side import DIM, HEADS, LAYERS, MakeCore, Side, assert_pages_equal, eventually


@pytest.fixture
def sides(make_core: MakeCore) -> tuple[Side, Side]:
    return Side(make_core(), 1), Side(make_core(), 2)


def test_finished_prefill_is_fetched_page_for_page(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    source = prefill.offer("t", [5, 1, 9, 0])
    prefill.ready("t", source, slice(None), 4)
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(1, 4), [7, 3, 2], finished=True)
    outcome = decode.outcomes.get(timeout=5)
    assert outcome.ok, outcome.error
    assert prefill.released.get(timeout=5).ok
    assert_pages_equal(prefill, [1, 9, 0], decode, [7, 3, 2])


def test_subscription_before_the_offer_streams_layer_by_layer(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.subscribe(prefill, "t", range(0, 3), [4, 5, 6])
    eventually(lambda: prefill.core.counters()["offers"] == 1)
    source = prefill.offer("t", [10, 11, 12])
    for layer in range(LAYERS):
        prefill.ready("t", source, slice(layer, layer + 1), 2)
    assert decode.outcomes.empty()
    prefill.ready("t", source, slice(None), 3)
    assert decode.outcomes.get(timeout=5).ok
    assert prefill.released.empty(), "pages are prefill's own until it finished"
    prefill.core.finish("t")
    assert prefill.released.get(timeout=5).ok
    assert_pages_equal(prefill, [10, 11, 12], decode, [4, 5, 6])


def test_unknown_transfer_of_a_finished_prefill_fails_at_once(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.subscribe(prefill, "never", range(1), [0], finished=True)
    outcome = decode.outcomes.get(timeout=5)
    assert "unknown_transfer" in outcome.error


def test_failed_chunk_reaches_decode_and_frees_prefill(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    source = prefill.offer("t", [1])
    prefill.backend().fail_window = Status.CHECKSUM_MISMATCH
    prefill.backend().hold_posts = True
    decode.subscribe(prefill, "t", range(1), [1])
    prefill.ready("t", source, slice(None), 1)
    prefill.core.finish("t")
    eventually(lambda: prefill.backend().counters()["posts"] > 0)
    prefill.backend().let_posts_go()
    assert "checksum_mismatch" in decode.outcomes.get(timeout=5).error
    prefill.released.get(timeout=5)


def test_withdrawn_offer_is_revoked_before_withdraw_returns(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    source = prefill.offer("t", [1, 2])
    prefill.backend().hold_posts = True
    decode.subscribe(prefill, "t", range(2), [1, 2])
    prefill.ready("t", source, slice(None), 2)
    eventually(lambda: prefill.backend().counters()["posts"] > 0)
    prefill.core.withdraw(["t"], "preempted")
    assert prefill.backend().counters()["posts"] == 0
    assert "preempted" in decode.outcomes.get(timeout=5).error
    assert not prefill.released.get(timeout=5).ok


def test_cancelled_subscription_frees_the_producer(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    source = prefill.offer("t", [1, 2])
    prefill.ready("t", source, slice(None), 1)
    started = decode.subscribe(prefill, "t", range(2), [1, 2])
    eventually(lambda: prefill.core.is_streaming("t"))
    decode.core.cancel(started[0])
    cancelled = decode.outcomes.get(timeout=5)
    assert cancelled.aborted and cancelled.error.startswith("cancelled: ")
    prefill.core.finish("t")
    assert "cancelled" in prefill.released.get(timeout=5).error
    assert decode.backend().counters()["windows"] == 0


def test_release_before_the_offer_is_remembered(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.core.release(prefill.address(), "t")
    eventually(lambda: prefill.core.counters()["sessions"] == 1)
    time.sleep(0.05)
    prefill.offer("t", [1])
    prefill.core.finish("t")
    assert prefill.released.get(timeout=5).unneeded


@pytest.mark.parametrize("offered", [True, False])
def test_what_decode_gave_up_is_no_success_on_prefill(sides: tuple[Side, Side], offered: bool) -> None:
    prefill, decode = sides
    if offered:
        prefill.offer("t", [1])
    decode.core.release(prefill.address(), "t", detail="the request was aborted")
    eventually(lambda: prefill.core.counters()["sessions"] == 1)
    time.sleep(0.05)
    if not offered:
        prefill.offer("t", [1])
    prefill.core.finish("t")
    assert prefill.released.get(timeout=5).error == "declined: told by the peer: the request was aborted"


def test_lease_runs_out_and_renewal_holds_it(make_core: MakeCore) -> None:
    prefill, decode = Side(make_core({"lease_s": 0.3}), 1), Side(make_core(), 2)
    prefill.offer("t", [1])
    prefill.core.finish("t")
    for _ in range(5):
        time.sleep(0.1)
        decode.core.renew(prefill.address(), ("t",))
    assert prefill.released.empty()
    assert "lease" in prefill.released.get(timeout=5).error


def test_many_renewals_travel_together(make_core: MakeCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit in a message, however long their names; none is sent for nothing."""
    prefill, decode = Side(make_core(), 1), Side(make_core(), 2)
    renewed: list[tuple[str, ...]] = []
    backend = decode.backend()
    send = backend.send

    def noted(connection: int, message: bytes) -> None:
        if isinstance(known := m.decode(message), m.Renew):
            renewed.append(known.transfer_ids)
        send(connection, message)

    monkeypatch.setattr(backend, "send", noted)
    names = tuple(f"{number:0>256}" for number in range(2 * m.MAX_RENEWED + 1))
    decode.core.renew(prefill.address(), ())
    decode.core.renew(prefill.address(), names)
    eventually(lambda: len(renewed) == 3)
    assert [len(some) for some in renewed] == [m.MAX_RENEWED, m.MAX_RENEWED, 1]
    assert sum(renewed, ()) == names
    decode.core.renew(prefill.address(), ("t",))  # the session bore them
    eventually(lambda: len(renewed) == 4)
    assert prefill.core.counters()["sessions"] == 1


def test_unmatched_subscription_and_deadline_end_in_time(make_core: MakeCore) -> None:
    prefill, decode = Side(make_core({"unmatched_timeout_s": 0.2}), 1), Side(make_core(), 2)
    decode.subscribe(prefill, "t", range(1), [0])
    assert "no prefill" in decode.outcomes.get(timeout=5).error
    prefill.offer("u", [1])
    decode.subscribe(prefill, "u", range(1), [0], deadline_s=0.2)
    error = decode.outcomes.get(timeout=5).error
    assert "deadline" in error or "time is over" in error, error  # either side may notice first
    prefill.core.finish("u")
    prefill.released.get(timeout=5)


def test_a_session_lost_twice_fails_the_load_and_frees_the_pages(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = sides
    monkeypatch.setattr(prefill.core._producer._returns, "_wait_s", 1.5)
    source = prefill.offer("t", [1])
    prefill.backend().hold_posts = True
    decode.subscribe(prefill, "t", range(1), [1])
    prefill.ready("t", source, slice(None), 1)
    prefill.core.finish("t")
    eventually(lambda: prefill.backend().counters()["posts"] > 0)
    for _ in range(2):
        eventually(lambda: prefill.backend().counters()["posts"] > 0)
        for connection in list(prefill.backend()._ends):
            prefill.backend().close_connection(connection)
    assert not decode.outcomes.get(timeout=5).ok
    prefill.released.get(timeout=5)
    second = prefill.offer("u", [2])
    prefill.backend().hold_posts = False
    prefill.ready("u", second, slice(None), 1)
    prefill.core.finish("u")
    decode.subscribe(prefill, "u", range(1), [2])
    assert decode.outcomes.get(timeout=5).ok, "the next transfer dials again"


def test_dead_and_changed_peers_are_named(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    gone = PeerAddress("gone", 0, ("memory://nowhere",))
    decode.subscribe(prefill, "t", range(1), [0], address=gone)
    assert "nobody listens" in decode.outcomes.get(timeout=5).error
    changed = PeerAddress("before-restart", 0, prefill.core.addresses)
    decode.subscribe(prefill, "t", range(1), [0], address=changed)
    assert "before-restart" in decode.outcomes.get(timeout=5).error


def test_other_secret_is_refused(make_core: MakeCore) -> None:
    prefill, decode = Side(make_core({"secret": "a"}), 1), Side(make_core({"secret": "b"}), 2)
    decode.subscribe(prefill, "t", range(1), [0])
    assert "secret" in decode.outcomes.get(timeout=5).error
    eventually(lambda: prefill.core.counters()["sessions"] == 0)


def test_schemas_that_differ_are_refused_with_field_and_both_values(make_core: MakeCore) -> None:
    def schema(dtype: str) -> KVCacheSchema:
        return KVCacheSchema("e", "m", dtype, LAYERS, HEADS, 0, HEADS, DIM, ())

    prefill, decode = Side(make_core(schema=schema("bf16")), 1), Side(make_core(schema=schema("fp8_e4m3")), 2)
    prefill.offer("t", [1])
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(1), [0], finished=True)
    error = decode.outcomes.get(timeout=5).error
    assert "dtype: fp8_e4m3 here, bf16 at the peer" in error
    prefill.released.get(timeout=5)


def test_pages_without_memory_are_refused_by_name(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    source = prefill.offer("t", [NULL_PAGE, 3])
    prefill.ready("t", source, slice(None), 2)
    prefill.core.finish("t")
    decode.subscribe(prefill, "t", range(2), [1, 2])
    assert "page 0 of group 0 is no longer kept" in decode.outcomes.get(timeout=5).error
    prefill.released.get(timeout=5)


def test_closing_an_engine_ends_everything_it_had(make_core: MakeCore) -> None:
    prefill, decode = Side(make_core(), 1), Side(make_core(), 2)
    prefill.offer("t", [1])
    decode.subscribe(prefill, "t", range(1), [0])
    eventually(lambda: prefill.core.is_streaming("t"))
    prefill.core.close()
    assert not decode.outcomes.get(timeout=5).ok
    assert not prefill.released.get(timeout=5).ok
    decode.core.close()


def test_what_was_given_up_is_refused_at_once_until_it_is_offered_again(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.subscribe(prefill, "room", range(2), [0, 1])
    until = time.monotonic() + 5
    while prefill.core.counters()["offers"] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    prefill.core.give_up(["room"], Reason(Code.WITHDRAWN, "prefill was aborted"))
    assert "prefill was aborted" in decode.outcomes.get(timeout=5).error
    decode.subscribe(prefill, "room", range(2), [0, 1])
    assert "prefill was aborted" in decode.outcomes.get(timeout=5).error
    source = prefill.offer("room", [4, 5])
    prefill.ready("room", source, slice(None), 2)
    prefill.core.finish("room")
    eventually(lambda: prefill.core.counters()["offers"] == 1)
    decode.subscribe(prefill, "room", range(2), [0, 1])
    assert decode.outcomes.get(timeout=5).ok and prefill.released.get(timeout=5).ok


def test_plain_memory_waits_for_all_its_consumers(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    row, read = np.arange(64, dtype=np.uint8), np.zeros((2, 64), dtype=np.uint8)
    prefill.core.register_memory([(row.ctypes.data, 64)])
    decode.core.register_memory([(read.ctypes.data, 128)])
    source = MemorySource(np.array([[row.ctypes.data, 64]], dtype=np.uint64))
    prefill.core.offer("row", source, prefill.released.put)
    prefill.core.finish("row")
    for index in range(2):
        segments = np.array([[read.ctypes.data + 64 * index, 64]], dtype=np.uint64)
        wanted = Wanted("row", MemoryTarget(segments), finished=False, deadline_s=5.0, consumers=2)
        decode.core.subscribe(prefill.address(), wanted, decode.outcomes.put)
        assert decode.outcomes.get(timeout=5).ok
    assert prefill.released.get(timeout=5).ok and (read == row).all()


def test_cancel_all_returns_when_nothing_is_written_any_more(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.offer("room", [4, 5])
    started = decode.subscribe(prefill, "room", range(2), [0, 1])
    decode.core.cancel_all(started)
    assert decode.outcomes.get_nowait().aborted


def test_a_cache_described_anew_ends_sessions_that_were_agreed_on_something_else(make_core: MakeCore) -> None:
    described = [
        KVCacheSchema("e", "m", "bf16", 1, 1, 0, 1, DIM, (), weights=weights) for weights in ("old", "new")
    ]
    prefill, decode = (Side(make_core(schema=described[0]), seed) for seed in (1, 2))
    for weights, arrives in ((None, True), (prefill, False), (decode, True)):
        if weights is not None:
            weights.core.describe(described[1])
        name = f"t{arrives}{weights is None}"
        prefill.prefilled(name, [5, 1])
        decode.subscribe(prefill, name, range(2), [7, 3], finished=True)
        outcome = decode.outcomes.get(timeout=5)
        assert outcome.ok is arrives
        if not arrives:
            assert "weights: old here, new at the peer" in outcome.error
    eventually(lambda: len(prefill.core.sessions) == len(decode.core.sessions) == 1)


def test_what_ended_leaves_no_timer(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides

    def timers() -> int:
        due = [timer for side in sides for _, _, timer in list(side.core._loop._timers._heap)]
        return sum(not timer.cancelled for timer in due)

    # Served, cancelled, withdrawn, declined, and fetched before it was offered.
    for transfer_id in ("served", "withdrawn", "declined"):
        source = prefill.offer(transfer_id, [3])
        if transfer_id != "declined":
            decode.subscribe(prefill, transfer_id, range(1), [1])
            eventually(lambda name=transfer_id: prefill.core.is_streaming(name))  # type: ignore[misc]
        if transfer_id == "withdrawn":
            prefill.core.withdraw([transfer_id], "preempted")
            continue
        prefill.ready(transfer_id, source, slice(None), 1)
        prefill.core.finish(transfer_id)
    decode.core.release(prefill.address(), "declined", 1, "it is here already")
    for _ in range(3):
        prefill.released.get(timeout=5)
    cancelled = decode.subscribe(prefill, "cancelled", range(1), [1])
    eventually(lambda: len(prefill.core._producer._early) == 1)
    decode.core.cancel(cancelled[0])
    decode.subscribe(prefill, "early", range(1), [2])
    eventually(lambda: "early" in {s.transfer_id for s in prefill.core._producer._early._waiting.values()})
    prefill.prefilled("early", [4])
    for _ in range(4):
        decode.outcomes.get(timeout=5)
    prefill.released.get(timeout=5)
    eventually(lambda: timers() == 0)


def test_a_consumer_that_forgets_its_own_deadline_is_not_served_for_ever(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.offer("t", [3])
    started = decode.subscribe(prefill, "t", range(1), [1], deadline_s=0.3)
    eventually(lambda: prefill.core.is_streaming("t"))
    deadline = started[0].deadline
    assert deadline is not None
    decode.core._loop.submit(deadline.cancel)
    eventually(lambda: not prefill.core.is_streaming("t"))
    outcome = decode.outcomes.get(timeout=5)
    assert outcome.failure is not None and outcome.failure.code is Code.DEADLINE


def test_the_second_of_two_that_wait_for_one_offer_hears_of_it_soon(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    for page in (1, 2):
        decode.subscribe(prefill, "t", range(1), [page])
    eventually(lambda: len(prefill.core._producer._early) == 2)
    prefill.prefilled("t", [3])
    outcomes = [decode.outcomes.get(timeout=5) for _ in range(2)]
    assert sorted(outcome.ok for outcome in outcomes) == [False, True]
    assert prefill.released.get(timeout=5).ok
