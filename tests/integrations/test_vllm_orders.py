# SPDX-License-Identifier: Apache-2.0
"""What the scheduler's half orders again, or voids, when caches and weights change under it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.bootstrap_room import RoomUses, pages_transfer
from sage_kv_connector.integrations.vllm.metadata import SageKVConnectorMetadata, SageKVHandshakeMetadata
from sage_kv_connector.integrations.vllm.scheduler import SchedulerSide
from tests.integrations.vllm_workers import SPEC, cache_config, vllm_config

REMOTE = {
    "do_remote_prefill": True,
    "transfer_id": "theirs",
    "remote_engine_id": "prefill",
    "remote_ranks": {"0": ["tcp://127.0.0.1:7000"]},
    "remote_node": "node",
    "tp_size": 1,
}
NO_STEP: Any = SimpleNamespace(
    total_num_scheduled_tokens=0,
    scheduled_new_reqs=[],
    scheduled_cached_reqs=SimpleNamespace(req_ids=[], resumed_req_ids=set()),
    num_scheduled_tokens={},
    finished_req_ids=set(),
)


def ranks(port: int) -> dict[int, SageKVHandshakeMetadata]:
    return {0: SageKVHandshakeMetadata((f"tcp://127.0.0.1:{port}",), "node", "")}


@pytest.fixture
def side() -> SchedulerSide:
    made = SchedulerSide(
        vllm_config(), cache_config(({"l0": SPEC}, SPEC)), KVTransportConfig.load({}), "engine"
    )
    made.set_ranks(ranks(7001))
    return made


def request(number: int, params: dict[str, Any]) -> Any:
    return SimpleNamespace(
        request_id=f"r{number}",
        kv_transfer_params=dict(params),
        prompt_token_ids=list(range(number, number + 40)),
        num_prompt_tokens=40,
        status=RequestStatus.WAITING,
        max_tokens=1,
        output_token_ids=[7],
    )


def ordered(side: SchedulerSide) -> SageKVConnectorMetadata:
    return side.build_meta(NO_STEP)


def test_awake_again_what_has_not_begun_is_put_on_offer_once_more(side: SchedulerSide) -> None:
    queued, preempted, runs = (request(i, {"do_remote_decode": True}) for i in range(3))
    waits = request(3, REMOTE)
    for one in (queued, preempted, runs, waits):
        side.on_new_request(one)
    preempted.status, runs.status = RequestStatus.PREEMPTED, RequestStatus.RUNNING
    first = ordered(side)
    assert len(first.offers) == 3 and len(first.expected) == 1
    side.set_ranks(ranks(7002))
    side.set_ranks(ranks(7002))
    assert side.has_pending_push_work()
    again = ordered(side)
    assert again.offers == first.offers[:2], "what runs lies in memory that was lost"
    assert again.expected == first.expected
    assert ordered(side).offers == []


def test_answers_name_where_the_workers_listen_since_they_are_awake(side: SchedulerSide) -> None:
    finished = request(0, {"do_remote_decode": True})
    side.on_new_request(finished)
    side.set_ranks(ranks(7002))
    finished.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, params = side.request_finished(finished, ([1, 2, 3],))
    assert params is not None and params["remote_ranks"] == {"0": ["tcp://127.0.0.1:7002"]}


def test_a_reset_and_other_weights_are_ordered_once_and_make_a_step(side: SchedulerSide) -> None:
    queued = request(0, {"do_remote_decode": True})
    side.on_new_request(queued)
    first = ordered(side)
    assert not side.has_pending_push_work()
    side.reset_cache()
    assert side.has_pending_push_work()
    assert ordered(side).void == "the KV cache was reset"
    side.weights_replaced("default")
    assert not side.has_pending_push_work()
    side.weights_replaced("7")
    orders = ordered(side)
    assert (orders.weights, orders.offers) == ("7", first.offers)
    side.weights_replaced("7")
    assert not side.has_pending_push_work()


def test_outputs_that_come_twice_change_nothing(side: SchedulerSide) -> None:
    """vLLM 0.33 replays the output of workers that failed in a step."""
    finished = request(0, {"do_remote_decode": True, "transfer_id": "t"})
    side.on_new_request(finished)
    ordered(side)
    finished.status = RequestStatus.FINISHED_LENGTH_CAPPED
    assert side.request_finished(finished, ([1, 2, 3],))[0]
    output = SimpleNamespace(finished_sending={"r0"}, finished_recving={"unknown"})
    side.update_connector_output(output)
    side.update_connector_output(output)
    side.on_new_request(request(1, {"do_remote_decode": True, "transfer_id": "t"}))
    assert [one.transfer_id for one in ordered(side).offers] == ["t"]


def test_blocks_may_be_given_later_than_the_match(side: SchedulerSide) -> None:
    """vLLM 0.33 may tell of an asynchronous load's blocks some steps after it asked what matches."""
    wanted = request(3, REMOTE)
    side.on_new_request(wanted)
    assert side.num_new_matched_tokens(wanted, 0) == (40, True)
    assert ordered(side).loads == []
    assert side.num_new_matched_tokens(wanted, 0) == (40, True)
    blocks = SimpleNamespace(blocks=[[SimpleNamespace(block_id=i) for i in (4, 5, 6)]])
    side.update_state_after_alloc(wanted, blocks, 40)
    (load,) = ordered(side).loads
    assert load.pages[0].ids.tolist() == [4, 5, 6]


def test_samples_in_a_room_are_offered_by_the_names_that_sglang_asks_for(side: SchedulerSide) -> None:
    for number in range(3):
        side.on_new_request(request(number, {"do_remote_decode": True, "bootstrap_room": 5}))
    uses = RoomUses()
    offers = ordered(side).offers
    assert [one.transfer_id for one in offers] == [pages_transfer(uses.next(5)) for _ in range(3)]
    assert {one.family for one in offers} == {pages_transfer(5)}, "vLLM's decode knows the room alone"
