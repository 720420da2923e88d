# SPDX-License-Identifier: Apache-2.0
"""Many requests at once, some of them given up by their clients; afterwards nothing is held any more."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from integration_tests.cluster import (
    PREFILL_PARAMS,
    Cluster,
    holdings,
    new_prompt,
    settled_gauges,
    shared_memory_files,
    wait_until,
)
from integration_tests.leaving_client import leaving
from sage_kv_connector.launch.process import Process
from sage_kv_connector.launch.vllm import Answer, complete

REQUESTS = 64


def give_up(process: Process, prompt: list[int], after_s: float, params: dict[str, object]) -> None:
    """Ask, and close the connection before the answer."""
    body = {
        "model": "model", "prompt": prompt, "max_tokens": 200, "temperature": 0, "ignore_eos": True,
        "stream": True, "kv_transfer_params": params,
    }  # fmt: skip
    with leaving(process, "/v1/completions", body):
        time.sleep(after_s)


def test_64_mixed_requests_with_aborts_are_right_and_leave_nothing_behind(cluster: Cluster) -> None:
    source = random.Random(64)
    lengths = [source.choice((16, 64, 250, 700, 1500, 3000, 8192)) for _ in range(REQUESTS)]
    prompts = [new_prompt(length) for length in lengths]
    cluster.hand_over(cluster.decode_shm, new_prompt(64))
    cluster.hand_over(cluster.decode_tcp, new_prompt(64))
    servers = (cluster.prefill, cluster.decode_shm, cluster.decode_tcp)
    time.sleep(1)
    held_before = [holdings(server) for server in servers]
    files_before = shared_memory_files()

    def one(index: int) -> Answer | None:
        prompt, decode = prompts[index], (cluster.decode_shm, cluster.decode_tcp)[index % 2]
        match index % 8:
            case 5:  # given up while it prefills
                give_up(cluster.prefill, prompt, source.random(), dict(PREFILL_PARAMS))
                return None
            case 6:  # given up while KV moves, or while it decodes
                give_up(decode, prompt, source.random() / 2, cluster.prefilled(prompt))
                return None
            case 7 if index % 16 == 7:  # prefilled, and never fetched
                cluster.prefilled(prompt)
                return None
            case 0 | 1:
                return complete(cluster.sequential.url, prompt, max_tokens=8)
            case 2 | 3:
                return complete(cluster.concurrent.url, prompt, max_tokens=8)
            case _:
                return cluster.hand_over(decode, prompt)

    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(pool.map(one, range(REQUESTS)))
    wrong = [
        (index, lengths[index])
        for index, answer in enumerate(answers)
        if answer is not None and answer.token_ids != cluster.alone(prompts[index])
    ]
    assert not wrong, f"(request, tokens): {wrong}"

    expected = {"offers": 0, "subscriptions": 0, "loads": 0, "on_offer": 0, "kv_cache_usage_perc": 0}
    for server in servers:
        left: dict[str, float] = {}

        def empty(server: Process = server, left: dict[str, float] = left) -> bool:
            left.update(settled_gauges(server))
            return {name: left[name] for name in expected} == expected

        wait_until(empty, 30, lambda server=server, left=left: f"{server.name} still holds {left}")  # type: ignore[misc]

    def as_before() -> bool:
        return all(
            now["threads"] <= before["threads"] + 2 and now["fds"] <= before["fds"] + 4
            for now, before in zip(map(holdings, servers), held_before, strict=True)
        )

    wait_until(as_before, 15, lambda: f"before {held_before}, now {[holdings(s) for s in servers]}")
    assert shared_memory_files() <= files_before


def test_decode_preempts_requests_that_were_handed_over(cluster: Cluster) -> None:
    """decode-tcp has 80 pages; these requests need more of them while they decode."""
    prompts = [new_prompt(1500) for _ in range(8)]
    answers: list[list[int]] = [[] for _ in prompts]

    def one(index: int) -> None:
        answers[index] = cluster.hand_over(cluster.decode_tcp, prompts[index], max_tokens=200).token_ids

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == cluster.alone(prompt, max_tokens=200)
