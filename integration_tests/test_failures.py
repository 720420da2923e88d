# SPDX-License-Identifier: Apache-2.0
"""Servers that die at the worst moment: the other side's clients get right answers, and in time."""

from __future__ import annotations

import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from integration_tests.cluster import TIMES, Cluster, gauges, new_prompt, settled_gauges, wait_until
from sage_kv_connector.launch.process import Process
from sage_kv_connector.launch.vllm import Answer, complete

#: Transfer deadline plus the time to compute the prompt here.
IN_TIME_S = TIMES["deadline_s"] + 15


def kill(process: Process) -> None:
    process.stop(signal.SIGKILL)


def restart(process: Process) -> None:
    process.start()
    process.wait_until_healthy()


def decode_later(
    pool: ThreadPoolExecutor, cluster: Cluster, prompt: list[int], params: dict[str, object]
) -> Future[Answer]:
    return pool.submit(
        complete, cluster.decode_tcp.url, prompt, max_tokens=8, kv_transfer_params=params, timeout_s=60
    )


def expect_hand_over(cluster: Cluster, decode: Process) -> None:
    """The next request's KV is moved again, not recomputed."""
    cluster.audit.write_text("")
    prompt = new_prompt(600)
    answer = cluster.hand_over(decode, prompt)
    records = cluster.audited(1)
    assert records[0]["sha256"] == records[1]["sha256"]
    assert answer.token_ids == cluster.alone(prompt)


def reference(cluster: Cluster, prompt: list[int]) -> list[int]:
    return complete(cluster.decode_shm.url, prompt, max_tokens=8).token_ids


@pytest.mark.full
def test_prefill_dies_before_the_transfer(cluster: Cluster) -> None:
    for decode in (cluster.decode_shm, cluster.decode_tcp):
        cluster.hand_over(decode, new_prompt(64))
    prompts = [new_prompt(700), new_prompt(700)]
    params = [cluster.prefilled(prompt) for prompt in prompts]
    kill(cluster.prefill)
    begun = time.monotonic()
    for decode, prompt, where in zip((cluster.decode_shm, cluster.decode_tcp), prompts, params, strict=True):
        answer = complete(decode.url, prompt, max_tokens=8, kv_transfer_params=where, timeout_s=60)
        assert answer.token_ids == reference(cluster, prompt)
    assert time.monotonic() - begun < IN_TIME_S
    restart(cluster.prefill)
    for decode in (cluster.decode_shm, cluster.decode_tcp):
        expect_hand_over(cluster, decode)


def test_prefill_dies_during_the_transfer(cluster: Cluster) -> None:
    cluster.hand_over(cluster.decode_tcp, new_prompt(64))
    prompt = new_prompt(3000)
    params = cluster.prefilled(prompt)
    cluster.proxy.hold_at(2_000_000)
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = decode_later(pool, cluster, prompt, params)
        assert cluster.proxy.held.wait(20)
        kill(cluster.prefill)
        cluster.proxy.cut()
        assert answer.result().token_ids == reference(cluster, prompt)
    assert time.monotonic() - begun < IN_TIME_S
    restart(cluster.prefill)
    expect_hand_over(cluster, cluster.decode_tcp)


def test_prefill_dies_after_the_transfer(cluster: Cluster) -> None:
    prompt = new_prompt(700)
    with ThreadPoolExecutor(1) as pool:
        params = cluster.prefilled(prompt)
        answer = pool.submit(
            complete, cluster.decode_shm.url, prompt, max_tokens=400, kv_transfer_params=params
        )
        cluster.audited(1)
        kill(cluster.prefill)
        token_ids = answer.result().token_ids
    assert token_ids == complete(cluster.decode_shm.url, prompt, max_tokens=400).token_ids
    restart(cluster.prefill)
    expect_hand_over(cluster, cluster.decode_shm)


def test_a_silent_network_costs_the_deadline_and_a_recompute(cluster: Cluster) -> None:
    cluster.hand_over(cluster.decode_tcp, new_prompt(64))
    prompt = new_prompt(3000)
    params = cluster.prefilled(prompt)
    cluster.proxy.hold_at(2_000_000)
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = decode_later(pool, cluster, prompt, params)
        assert cluster.proxy.held.wait(20)
        assert answer.result().token_ids == reference(cluster, prompt)
    assert time.monotonic() - begun < IN_TIME_S
    cluster.proxy.cut()
    expect_hand_over(cluster, cluster.decode_tcp)


@pytest.mark.full
def test_decode_dies_during_the_transfer(cluster: Cluster) -> None:
    cluster.hand_over(cluster.decode_tcp, new_prompt(64))
    prompt = new_prompt(3000)
    params = cluster.prefilled(prompt)
    cluster.proxy.hold_at(2_000_000)
    with ThreadPoolExecutor(1) as pool:
        answer = decode_later(pool, cluster, prompt, params)
        assert cluster.proxy.held.wait(20)
        kill(cluster.decode_tcp)
        cluster.proxy.cut()
        assert answer.exception() is not None
    other = new_prompt(300)
    assert cluster.hand_over(cluster.decode_shm, other).token_ids == cluster.alone(other)
    wait_until(
        lambda: settled_gauges(cluster.prefill)["on_offer"] == 0,
        TIMES["lease_s"] + 5,
        lambda: f"prefill still holds {gauges(cluster.prefill)}",
    )
    restart(cluster.decode_tcp)
    expect_hand_over(cluster, cluster.decode_tcp)
