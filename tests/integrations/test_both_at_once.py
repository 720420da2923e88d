# SPDX-License-Identifier: Apache-2.0
"""A router that asks both servers at once: how prefill answers it, how it is found again, and by what name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.engine import MAX_TRANSFER_ID
from sage_kv_connector.integrations.common.bootstrap_answers import query_engine
from sage_kv_connector.integrations.vllm import chosen_rank
from sage_kv_connector.integrations.vllm.remote_prefill import parse_remote
from sage_kv_connector.integrations.vllm.scheduler import SchedulerSide
from sage_kv_connector.integrations.vllm.shared_request import (
    MAX_REQUEST_ID,
    request_transfer,
    shared_transfer,
)
from tests.integrations.test_vllm_orders import NO_STEP, ranks, request
from tests.integrations.vllm_workers import SPEC, Worker, cache_config, load, vllm_config

HEADER = "___prefill_addr_10.0.0.1:8001___decode_addr_decode-0.pool:8002_4feb108738de4d059d98f94fa4435b4f"
#: As vllm-router 0.1.17 sends it to decode, and nothing else.
ROUTED = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "e", "remote_host": "10.0.0.1",
    "remote_port": 7100, "tp_size": 2, "remote_request_id": HEADER,
}  # fmt: skip
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_host": None,
}


@pytest.mark.parametrize(
    ("request_id", "prompt"),
    [
        (f"cmpl-{HEADER}-0-1a2b3c4d", 0), (f"cmpl-{HEADER}-17-1a2b3c4d", 17), (f"2_cmpl-{HEADER}-0-1a2b3c4d", 0),
        (f"cmpl-{HEADER}-3", 3), (f"chatcmpl-{HEADER}-1a2b3c4d", 0), (f"1_chatcmpl-{HEADER}-1a2b3c4d", 0),
        (f"chatcmpl-{HEADER}", 0), (f"chatcmpl-{HEADER}_3-1a2b3c4d", 3), (f"generate-tokens-{HEADER}-1a2b3c4d", 0),
    ],
)  # fmt: skip
def test_prefill_and_decode_name_a_prompt_of_a_request_alike(request_id: str, prompt: int) -> None:
    of_decode = request_id.replace("1a2b3c4d", "0f0f0f0f")
    name = parse_remote(ROUTED, of_decode).transfer_id
    assert shared_transfer(request_id) == request_transfer(HEADER, prompt) == name


@pytest.mark.parametrize(
    "request_id", ["", "r1", "cmpl-", "cmpl--0", "chatcmpl-", "embd-x-0", "cmpl-" + "x" * 5000]
)
def test_other_ids_have_no_name(request_id: str) -> None:
    assert shared_transfer(request_id) == ""


@given(st.text(min_size=1, max_size=MAX_REQUEST_ID), st.integers(0, 999))
def test_any_header_makes_a_name_that_a_peer_accepts(header: str, prompt: int) -> None:
    name = request_transfer(header, prompt)
    assert 0 < len(name) <= MAX_TRANSFER_ID
    assert shared_transfer(f"cmpl-{header}-{prompt}-0f0f0f0f") == name


def test_names_of_rooms_cant_be_taken() -> None:
    """A room's transfers are found without a digest."""
    assert shared_transfer("chatcmpl-sglang-5-1a2b3c4d") == "request-sglang-5#0"


def test_decode_finds_prefill_by_what_the_router_passes_on() -> None:
    remote = parse_remote(ROUTED)
    assert (
        remote.place == ("http://10.0.0.1:7100/own", "e") and remote.prefill is None and not remote.finished
    )
    assert parse_remote(ROUTED | {"remote_host": "fe80::1"}).bootstrap == "http://[fe80::1]:7100/own"
    named = parse_remote(ROUTED | {"transfer_id": "xfer-1"})
    assert named.transfer_id == "xfer-1", "llm-d gives both servers an id of its own"


@pytest.mark.parametrize(
    ("field", "value"),
    [("remote_engine_id", ""), ("remote_engine_id", 5), ("remote_engine_id", "x" * 5000),
     ("remote_host", ""), ("remote_host", 5), ("remote_host", "h/../"), ("remote_host", "u@h"),
     ("remote_host", "h" * 254), ("remote_host", "h\n"),
     ("remote_port", 0), ("remote_port", 65536), ("remote_port", True), ("remote_port", "7100"), ("remote_port", None),
     ("remote_request_id", ""), ("remote_request_id", None), ("remote_request_id", "x" * (MAX_REQUEST_ID + 1)),
     ("transfer_id", 5), ("transfer_id", "")],
)  # fmt: skip
def test_what_a_client_put_there_is_bounded_and_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is ") as caught:
        parse_remote(ROUTED | {field: value})
    assert len(str(caught.value)) < 300 and ("must be" in str(caught.value) or "allowed" in str(caught.value))


@pytest.fixture
def side() -> Iterator[SchedulerSide]:
    made = scheduler({})
    yield made
    made.shutdown()


def scheduler(options: dict[str, Any], engine_id: str = "engine", **parallel: Any) -> SchedulerSide:
    config = vllm_config()
    vars(config.parallel_config).update(parallel)
    made = SchedulerSide(
        config, cache_config(({"l0": SPEC}, SPEC)), KVTransportConfig.load(options), engine_id
    )
    made.set_ranks(ranks(7001))
    return made


def answered(side: SchedulerSide, one: Any) -> dict[str, Any]:
    side.on_new_request(one)
    one.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, params = side.request_finished(one, ([1, 2, 3],))
    assert params is not None
    return params


def test_an_answer_says_what_such_a_router_remembers_and_decode_learns_the_rest(side: SchedulerSide) -> None:
    params = answered(side, request(0, PREFILL))
    assert params["remote_ranks"] == {"0": ["tcp://127.0.0.1:7001"]}, "a router of before passes this on"
    passed = {name: params[name] for name in ("remote_engine_id", "remote_host", "remote_port", "tp_size")}
    assert params["transfer_mode"] == "push" and passed["remote_host"] == "127.0.0.1"
    remote = parse_remote({**passed, "remote_request_id": HEADER})
    found = query_engine(remote.bootstrap, 5.0, remote.engine_id)
    assert found.ranks[0].addresses == ("tcp://127.0.0.1:7001",)
    assert answered(side, request(1, PREFILL))["remote_port"] == params["remote_port"]


@pytest.mark.parametrize("options", [{"concurrent": False}, {"port": 7001}, {"advertise_port": 7001}])
def test_no_port_is_opened_that_peers_may_not_reach(options: dict[str, Any]) -> None:
    params = answered(side := scheduler(options), request(0, PREFILL))
    side.shutdown()
    assert "transfer_mode" not in params and "remote_port" not in params and params["remote_ranks"]


def test_a_rank_says_so_only_where_the_router_chose_it() -> None:
    """vLLM itself may give the next request to another rank than the one that answered."""
    side = scheduler({}, "engine_dp1")
    assert "transfer_mode" not in answered(side, request(0, PREFILL))
    chosen = request(1, PREFILL)
    setattr(chosen, chosen_rank._CHOSEN, True)
    assert answered(side, chosen)["transfer_mode"] == "push"
    side.shutdown()
    alone = scheduler({}, "engine_dp1", data_parallel_external_lb=True)
    assert answered(alone, request(0, PREFILL))["transfer_mode"] == "push"
    alone.shutdown()


def test_vllms_requests_remember_whether_their_rank_was_chosen() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    chosen_rank.follow_chosen_ranks()
    chosen_rank.follow_chosen_ranks()
    for rank, again in ((None, False), (0, True), (1, True)):
        fields: dict[str, Any] = dict.fromkeys(EngineCoreRequest.__struct_fields__)
        given = EngineCoreRequest(
            **fields | {"request_id": "r", "prompt_token_ids": [1, 2], "sampling_params": SamplingParams(max_tokens=1),
                        "arrival_time": 0.0, "data_parallel_rank": rank, "client_index": 0, "current_wave": 0,
                        "priority": 0, "resumable": False}
        )  # fmt: skip
        made = Request.from_engine_core_request(given, None)
        parallel = SimpleNamespace(data_parallel_external_lb=False)
        assert chosen_rank.always_this_engine(made, "engine_dp0", parallel) is again


def test_a_prefill_goes_by_its_routers_request_too(side: SchedulerSide) -> None:
    several = [request(i, PREFILL) for i in range(2)]
    for i, one in enumerate(several):
        one.request_id = f"cmpl-{HEADER}-{i}-1a2b3c4d"
        side.on_new_request(one)
    first, second = side.build_meta(NO_STEP).offers
    assert [first.family, second.family] == [request_transfer(HEADER, prompt) for prompt in range(2)]
    assert len({first.transfer_id, second.transfer_id, first.family, second.family}) == 4
    named = request(2, PREFILL | {"transfer_id": "xfer-1"})
    named.request_id = f"chatcmpl-{HEADER}-1a2b3c4d"
    side.on_new_request(named)
    assert side.build_meta(NO_STEP).offers[0].family == "xfer-1"


def test_decode_hears_of_a_prefill_that_ended_before_it_was_on_offer(side: SchedulerSide) -> None:
    aborted = request(0, PREFILL)
    aborted.request_id = f"chatcmpl-{HEADER}-1a2b3c4d"
    side.on_new_request(aborted)
    aborted.status = RequestStatus.FINISHED_ABORTED
    side.request_finished(aborted, ([],))
    assert side.has_pending_push_work()
    orders = side.build_meta(NO_STEP)
    assert request_transfer(HEADER) in orders.given_up and not orders.offers
    began = request(1, PREFILL)
    side.on_new_request(began)
    side.build_meta(NO_STEP)
    began.status = RequestStatus.FINISHED_ABORTED
    side.request_finished(began, ([],))
    orders = side.build_meta(NO_STEP)
    assert len(orders.withdrawn) == 1 and not orders.given_up, "its consumers hear of it from the offer"


def test_decode_hears_of_a_prefill_that_is_not_handed_over(side: SchedulerSide) -> None:
    refused = request(0, PREFILL | {"bootstrap_room": "5"})
    refused.request_id = f"cmpl-{HEADER}-1-1a2b3c4d"
    side.on_new_request(refused)
    assert side.build_meta(NO_STEP).given_up == [request_transfer(HEADER, 1)]


def test_who_waits_for_it_hears_so_from_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = Worker("prefill", 1, "tcp"), Worker("decode", 2, "tcp")
    try:
        with caplog.at_level(logging.WARNING):
            first = decode.step(loads=[load(prefill.prefill(), "x", [1, 2, 3], done=False)])
            prefill.step(given_up=["x"])
            results = decode.until(lambda one: "d-x" in one.received, first)
        assert results.failed == {"d-x"}
        assert "prefill was aborted before it began" in caplog.text
    finally:
        prefill.close()
        decode.close()


def test_pages_are_kept_for_decode_that_queues_whoever_asked_it(side: SchedulerSide) -> None:
    queued = request(0, ROUTED)
    side.on_new_request(queued)
    assert [one.transfer_id for one in side.build_meta(NO_STEP).expected] == [request_transfer(HEADER)]
