# SPDX-License-Identifier: Apache-2.0
"""Caches that vLLM discards and makes anew, resets, and weights replaced while it runs: nothing wrong moves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from sage_kv_connector.integrations.vllm.metadata import SageKVConnectorMetadata
from tests.integrations.vllm_workers import (
    PAGE,
    TOKENS,
    Worker,
    finished,
    handed_over,
    load,
    offered,
    progress,
)

Pair = tuple[Worker, Worker]


@pytest.fixture(params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Worker("prefill", 1, request.param), Worker("decode", 2, request.param)
    yield made
    for worker in made:
        worker.close()


def transport_threads() -> int:
    return sum(thread.name.startswith("sage-kvt") for thread in threading.enumerate())


def test_a_prefill_that_sleeps_withdraws_what_is_on_offer_and_says_so(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = pair
    threads, before = transport_threads(), decode.pages([4, 5, 6])
    prefill.step(offers=[offered("runs"), offered("held")], progress=[progress("runs", (1, 2, 3), PAGE)])
    prefill.step(progress=[progress("held", (4, 5, 6), TOKENS)])
    prefill.step(finished=[finished("held", (4, 5, 6))])
    decode.step(loads=[load(prefill.prefill(), "runs", [4, 5, 6], done=False)])
    known = prefill.side._registered
    assert known is not None
    while not known.core.is_streaming("runs"):
        decode.step(forward=False)
    with caplog.at_level(logging.DEBUG, "sage_kv_connector"):
        prefill.side.unregister_kv_caches()
        prefill.side.unregister_kv_caches()
        for one in prefill.caches.values():
            one.zero_()
        results = decode.until(lambda one: one.received == {"d-runs"})
    assert results.failed == {"d-runs"} and results.invalid_blocks == {4, 5, 6}
    # Prefill says why. Decode hears it, unless the end of the connection overtakes the message.
    assert "transfer runs: given up: vLLM discards its KV cache" in caplog.text
    assert decode.pages([5, 6]) == [layer[len(layer) // 3 :] for layer in before]
    assert transport_threads() < threads and prefill.side.handshake_metadata() is None
    assert prefill.step(forward=False).sent == {"p-held"}
    assert prefill.step(forward=False).sent == set()


def test_a_decode_that_sleeps_reports_its_loads_as_failed(pair: Pair) -> None:
    prefill, decode = pair
    prefill.step(offers=[offered("t")], progress=[progress("t", (1, 2, 3), PAGE)])
    decode.step(loads=[load(prefill.prefill(), "t", [4, 5, 6], done=False)])
    known = prefill.side._registered
    assert known is not None
    while not known.core.is_streaming("t"):
        decode.step(forward=False)
    decode.side.unregister_kv_caches()
    asleep = decode.pages([0, 1, 2, 3, 4, 5, 6, 7])
    prefill.step(progress=[progress("t", (1, 2, 3), TOKENS)])
    sent = prefill.step(finished=[finished("t", (1, 2, 3))])
    results = decode.step(forward=False)
    assert results.failed == results.received == {"d-t"} and results.invalid_blocks == {4, 5, 6}
    assert prefill.until(lambda one: bool(one.sent), sent).sent == {"p-t"}
    assert decode.pages([0, 1, 2, 3, 4, 5, 6, 7]) == asleep
    assert decode.step(forward=False).received == set()
    for _ in range(2):
        assert decode.counted("failed_loads_total", "withdrawn") == 1
        decode.side.restore_kv_caches()


def test_pages_that_landed_but_were_not_reported_failed_with_the_cache(pair: Pair) -> None:
    prefill, decode = pair
    prefill.step(offers=[offered("t")], progress=[progress("t", (1, 2, 3), TOKENS)])
    prefill.step(finished=[finished("t", (1, 2, 3))])
    decode.side.begin_step(SageKVConnectorMetadata(loads=[load(prefill.prefill(), "t", [4, 5, 6])]))
    assert prefill.until(lambda one: bool(one.sent)).sent == {"p-t"}
    decode.side._results.wait(5.0)
    decode.side.unregister_kv_caches()
    assert decode.step(forward=False).failed == {"d-t"}


def test_awake_again_new_transfers_are_right_and_nothing_of_before_reaches_the_memory(pair: Pair) -> None:
    prefill, decode = pair
    assert handed_over(prefill, decode, "before", [1, 2, 3], [4, 5, 6])
    stale, counted = prefill.prefill(), prefill.counted("link_bytes_total", "sent")
    prefill.step(offers=[offered("old")], progress=[progress("old", (1, 2, 3), TOKENS)])
    for worker in pair:
        worker.side.unregister_kv_caches()
        for seed, one in enumerate(worker.caches.values()):
            one.fill_(seed)
        worker.side.restore_kv_caches()
        worker.side.restore_kv_caches()
    first = decode.step(loads=[load(stale, "old", [4, 5, 6])])
    assert decode.until(lambda one: bool(one.received), first).failed == {"d-old"}
    for seed, one in enumerate(prefill.caches.values()):
        one.random_(0, 100 + seed)
    assert handed_over(prefill, decode, "after", [3, 1, 2], [7, 2, 5])
    assert handed_over(decode, prefill, "back", [7, 2, 5], [4, 6, 5])
    assert prefill.counted("link_bytes_total", "sent") == 2 * counted > 0, "counters go on"


def test_orders_for_caches_that_are_not_there_fail_at_once(pair: Pair) -> None:
    prefill, decode = pair
    decode.side.unregister_kv_caches()
    ordered = {"loads": [load(prefill.prefill(), "t", [4])], "finished": [finished("u", (1, 2, 3))]}
    results = decode.step(forward=False, **ordered)
    assert (results.sent, results.received, results.failed) == ({"p-u"}, {"d-t"}, {"d-t"})
    assert results.invalid_blocks == {4}


def test_a_reset_voids_what_waits_to_be_fetched_and_what_is_fetched(pair: Pair) -> None:
    prefill, decode = pair
    prefill.step(
        offers=[offered("held"), offered("runs")],
        progress=[progress("held", (1, 2, 3), TOKENS), progress("runs", (4, 5, 6), PAGE)],
    )
    prefill.step(finished=[finished("held", (1, 2, 3))])
    assert prefill.step(void="the KV cache was reset").sent == {"p-held"}
    there = prefill.prefill()
    first = decode.step(loads=[load(there, "held", [1, 2, 3]), load(there, "runs", [4, 5, 6], done=False)])
    assert decode.until(lambda one: bool(one.received), first).failed == {"d-held"}
    results = decode.step(void="the KV cache was reset")
    assert results.failed == {"d-runs"} and results.invalid_blocks == {4, 5, 6}
    prefill.step(progress=[progress("runs", (4, 5, 6), TOKENS)])
    first = prefill.step(finished=[finished("runs", (4, 5, 6))])
    assert prefill.until(lambda one: bool(one.sent), first).sent == {"p-runs"}


def test_kv_of_replaced_weights_is_refused_by_name_until_both_sides_have_them(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    prefill, decode = pair
    assert handed_over(prefill, decode, "before", [1, 2, 3], [4, 5, 6])
    computed = [progress("old", (1, 2, 3), TOKENS)]
    prefill.step(offers=[offered("old"), offered("queued")], progress=computed)
    prefill.step(finished=[finished("old", (1, 2, 3))])
    assert prefill.step(weights="7", offers=[offered("queued")]).sent == {"p-old"}
    with caplog.at_level(logging.WARNING):
        first = decode.step(loads=[load(prefill.prefill(), "old", [4, 5, 6])])
        assert decode.until(lambda one: bool(one.received), first).failed == {"d-old"}
        why = "weights: as stored: dummy here, as stored: dummy, version 7 at the peer"
        for attempt in range(50):  # until decode noticed that prefill ended the session
            assert not handed_over(prefill, decode, f"other-{attempt}", [1, 2, 3], [4, 5, 6])
            if why in caplog.text:
                break
    assert why in caplog.text
    decode.step(weights="7")
    assert handed_over(prefill, decode, "queued", [1, 2, 3], [4, 5, 6], on_offer=True)
    assert handed_over(decode, prefill, "back", [1, 2, 3], [4, 5, 6])


def test_results_may_be_asked_for_before_the_forward_pass_is_told_to_have_ended(pair: Pair) -> None:
    """With a drafter vLLM 0.33 takes a step's results before ``wait_for_save``."""
    prefill, decode = pair
    side = prefill.side
    side.begin_step(
        SageKVConnectorMetadata(offers=[offered("t")], progress=[progress("t", (1, 2, 3), TOKENS)])
    )
    assert side.take_results(idle=False).sent == set()
    side.end_forward()
    prefill.step(finished=[finished("t", (1, 2, 3))])
    first = decode.step(loads=[load(prefill.prefill(), "t", [4, 5, 6])])
    assert not decode.until(lambda one: bool(one.received), first).failed
    assert prefill.pages([1, 2, 3]) == decode.pages([4, 5, 6])


@pytest.mark.parametrize("hooks", [False, True])
def test_sleep_is_refused_where_vllm_does_not_tell_of_it(hooks: bool) -> None:
    from sage_kv_connector.integrations.vllm.connector import refuse_sleep_mode

    base: Any = type("Base", (), {"unregister_kv_caches": None} if hooks else {})
    config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))
    if hooks:
        refuse_sleep_mode(config, base)
    else:
        with pytest.raises(ValueError, match=r"enable_sleep_mode is True.*must be False, or vLLM 0\.33"):
            refuse_sleep_mode(config, base)


def test_the_engine_core_tells_connectors_of_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCore

    from sage_kv_connector.integrations.vllm.weights import follow_weights

    monkeypatch.setattr(EngineCore, "set_weight_version", EngineCore.set_weight_version)
    follow_weights()
    follow_weights()
    heard: list[str] = []
    ours = SimpleNamespace(weights_replaced=heard.append)
    core: Any = object.__new__(EngineCore)
    core.scheduler = SimpleNamespace(connector=SimpleNamespace(_connectors=[SimpleNamespace(), ours]))
    core.set_weight_version("3")
    assert heard == ["3"] and core.get_weight_version() == "3"
    core.scheduler.connector = None
    core.set_weight_version("4")
    assert heard == ["3"]
