# SPDX-License-Identifier: Apache-2.0
"""A prompt prefilled by one server and decoded by another: same token ids, same KV bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from integration_tests.cluster import Cluster, gauges, new_prompt
from sage_kv_connector.launch.vllm import complete

LENGTHS = (16, 127, 128, 129, 300, 2000, 6000)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dispatch", ["sequential", "concurrent"])
def test_an_unmodified_router_hands_over(cluster: Cluster, dispatch: str, tokens: int) -> None:
    prompt = new_prompt(tokens)
    front = cluster.sequential if dispatch == "sequential" else cluster.concurrent
    routed = complete(front.url, prompt, max_tokens=8)
    records = cluster.audited(1)
    assert routed.token_ids == cluster.alone(prompt)
    assert {record["side"] for record in records} == {"producer", "consumer"}
    assert records[0]["sha256"] == records[1]["sha256"]
    assert records[0]["backend"] == "shm"
    pages = -(-tokens // 128)
    assert records[0]["nbytes"] == pages * 128 * 4096, "whole pages of 4 KiB a token in fp32"


@pytest.mark.parametrize("tokens", [16, 300, 6000])
def test_tcp_hands_over_with_a_checksum(cluster: Cluster, tokens: int) -> None:
    prompt = new_prompt(tokens)
    answer = cluster.hand_over(cluster.decode_tcp, prompt)
    records = cluster.audited(1)
    assert answer.token_ids == cluster.alone(prompt)
    assert records[0]["sha256"] == records[1]["sha256"]
    assert all(record["backend"] == "tcp" and record["checksum"] for record in records)


def test_decode_asks_only_for_what_its_prefix_cache_lacks(cluster: Cluster) -> None:
    head = new_prompt(1280)
    cluster.hand_over(cluster.decode_shm, head)
    cluster.audited(1)
    longer = head + new_prompt(640)
    answer = cluster.hand_over(cluster.decode_shm, longer)
    records = cluster.audited(1)
    assert answer.token_ids == cluster.alone(longer)
    assert records[0]["nbytes"] == 640 * 4096
    assert records[0]["sha256"] == records[1]["sha256"]


def test_questions_about_one_document_fetch_it_once(cluster: Cluster) -> None:
    document = new_prompt(30 * 128)
    prompts = [document + new_prompt(200) for _ in range(4)]
    params = [cluster.prefilled(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = pool.map(
            lambda prompt, given: complete(
                cluster.decode_tcp.url, prompt, max_tokens=8, kv_transfer_params=given
            ),
            prompts,
            params,
        )
    assert [answer.token_ids for answer in answers] == [cluster.alone(prompt) for prompt in prompts]
    records = cluster.audited(len(prompts))
    assert (
        sum(record["nbytes"] for record in records if record["side"] == "consumer")
        == (30 + 2 * len(prompts)) * 128 * 4096
    )


def test_a_prompt_that_decode_knows_already_moves_at_most_its_last_page(cluster: Cluster) -> None:
    prompt = new_prompt(1000)
    first = cluster.hand_over(cluster.decode_shm, prompt)
    cluster.audited(1)
    again = cluster.hand_over(cluster.decode_shm, prompt)
    assert again.token_ids == first.token_ids
    records = cluster.audited(1)
    assert records[0]["nbytes"] <= 128 * 4096


def test_a_request_without_transfer_parameters_is_served_as_ever(cluster: Cluster) -> None:
    prompt = new_prompt(400)
    assert complete(cluster.decode_shm.url, prompt, max_tokens=8).token_ids == cluster.alone(prompt)


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "transfer_id": "x", "remote_engine_id": "y", "remote_ranks": "z"},
        {"do_remote_prefill": True, "transfer_id": 5, "remote_engine_id": [], "remote_ranks": {}},
        {
            "do_remote_prefill": True,
            "transfer_id": "x",
            "remote_engine_id": "y",
            "remote_ranks": {"0": ["tcp://127.0.0.1:1"]},
        },
    ],
)
def test_unusable_transfer_parameters_cost_a_recompute_only(
    cluster: Cluster, params: dict[str, object]
) -> None:
    prompt = new_prompt(200)
    answer = complete(cluster.decode_shm.url, prompt, max_tokens=8, kv_transfer_params=params)
    assert answer.token_ids == cluster.alone(prompt)


def test_one_flipped_byte_is_caught_and_recomputed(cluster: Cluster) -> None:
    cluster.hand_over(cluster.decode_tcp, new_prompt(64))  # the session is open
    before = gauges(cluster.decode_tcp)["checksum_failures"]
    prompt = new_prompt(2000)
    params = cluster.prefilled(prompt)
    cluster.proxy.flip_byte_at(3_000_000)
    answer = complete(cluster.decode_tcp.url, prompt, max_tokens=8, kv_transfer_params=params)
    assert cluster.proxy.flipped
    assert answer.token_ids == cluster.alone(prompt)
    assert gauges(cluster.decode_tcp)["checksum_failures"] == before + 1
    cluster.audit.write_text("")
    cluster.hand_over(cluster.decode_tcp, new_prompt(64))
    assert len(cluster.audited(1)) == 2, "the next request hands over again"
