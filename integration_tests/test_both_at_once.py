# SPDX-License-Identifier: Apache-2.0
"""vLLM's own router asks both servers at once from its second request on: KV moves while prefill computes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from integration_tests.cluster import (
    TIMES,
    Cluster,
    bare_word,
    gauges,
    learn,
    new_prompt,
    settled_gauges,
    wait_until,
)
from integration_tests.leaving_client import leaving
from integration_tests.request_pair import STALL_S
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.vllm import VllmOptions, complete, metric, router, vllm_server

#: Several of prefill's steps.
LONG = 8192


class Seen(NamedTuple):
    """Both servers at one moment: bytes that prefill sent since before, while it computed the prompt; who waited."""

    sent: float
    subscriptions: float


def watched(cluster: Cluster, prompt: list[int]) -> tuple[list[int], list[Seen]]:
    """The router's answer, and what both servers' /metrics said while prefill was busy with it."""
    before = settled_gauges(cluster.prefill)["link_bytes"]
    settled_gauges(cluster.decode_shm)
    seen = []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, cluster.concurrent.url, prompt, max_tokens=8)
        while not answer.done():
            sent = gauges(cluster.prefill).get("link_bytes", 0) - before
            waits = gauges(cluster.decode_shm).get("subscriptions", 0)
            if metric(cluster.prefill, "vllm:num_requests_running"):  # asked last: it was busy all the while
                seen.append(Seen(sent, waits))
    return answer.result().token_ids, seen


def test_kv_arrives_while_prefill_is_busy(cluster: Cluster) -> None:
    cluster.audit.write_text("")
    for _ in range(2):
        prompt = new_prompt(LONG)
        token_ids, seen = watched(cluster, prompt)
        records = cluster.audited(1)
        assert token_ids == cluster.alone(prompt)
        assert records[0]["sha256"] == records[1]["sha256"]
        whole = records[0]["nbytes"]
        assert any(0 < one.sent < whole and one.subscriptions == 1 for one in seen), (
            f"of {whole} bytes, in {len(seen)} looks while prefill was busy: {sorted(set(seen))}"
        )


def test_a_restarted_prefill_is_found_again_or_not_missed(cluster: Cluster) -> None:
    """The router names the engine that was there before, once; then the new one has answered."""
    learn(cluster.concurrent)
    cluster.prefill.stop()
    cluster.prefill.start()
    cluster.prefill.wait_until_healthy()
    for _ in range(3):
        prompt = new_prompt(600)
        began = time.monotonic()
        right = cluster.alone(prompt)
        alone_s = time.monotonic() - began
        began = time.monotonic()
        routed = complete(cluster.concurrent.url, prompt, max_tokens=8)
        assert time.monotonic() - began < alone_s + STALL_S
        assert routed.token_ids == right
    cluster.audit.write_text("")
    prompt = new_prompt(600)
    assert complete(cluster.concurrent.url, prompt, max_tokens=8).token_ids == cluster.alone(prompt)
    cluster.audited(1)


@pytest.mark.full
def test_on_free_ports_decode_hears_at_once_that_nobody_is_there(
    scratch: Path, model: Path, secret: dict[str, str]
) -> None:
    """Without any port in the options the router's memory of a prefill that was restarted leads nowhere."""
    options = VllmOptions(model, scratch, 2048, extra=("--dtype", "float32"), env=secret)
    first, second = core_halves()
    prefill = vllm_server("prefill-free", options, bare_word(), first)
    decode = vllm_server("decode-free", options, bare_word(), second)
    front = router(prefill, decode, scratch)

    def handed_over(failed: int) -> None:
        """``failed``: loads that did not arrive."""
        prompt, before = new_prompt(600), gauges(decode).get("failed_loads", 0)
        began = time.monotonic()
        right = complete(prefill.url, prompt, max_tokens=8).token_ids
        alone_s = time.monotonic() - began
        began = time.monotonic()
        assert complete(front.url, prompt, max_tokens=8).token_ids == right
        assert time.monotonic() - began < alone_s + STALL_S
        assert settled_gauges(decode).get("failed_loads", 0) - before == failed

    with running(prefill, decode), running(front):
        for _ in range(3):
            handed_over(failed=0)
        prefill.stop()
        prefill.start()
        prefill.wait_until_healthy()
        handed_over(failed=1)
        handed_over(failed=0)


@pytest.mark.parametrize("what", ["a client that hangs up", "a request that decode refuses"])
def test_nothing_is_held_of_requests_that_end_early(cluster: Cluster, what: str) -> None:
    if what == "a client that hangs up":
        hang_up(cluster, new_prompt(LONG))
    else:  # prefill is asked for one token
        with pytest.raises(ServerError, match="400"):
            complete(cluster.concurrent.url, new_prompt(600), max_tokens=10**6)
    nothing_is_held(cluster)


@pytest.mark.full
def test_mixed_requests_get_right_answers_while_prefill_is_restarted(cluster: Cluster) -> None:
    """64 prompts of many lengths, eight at a time; every eighth client hangs up. Nobody begins while it is down."""
    learn(cluster.concurrent)
    prompts = [new_prompt((16, 200, 600, 2000, LONG)[i % 5]) for i in range(64)]
    done: list[_Ended] = []
    there = threading.Event()
    there.set()
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(_ask, cluster, prompt, i % 8 == 7, there, done) for i, prompt in enumerate(prompts)
        ]
        wait_until(lambda: len(done) >= 24, 120.0, lambda: f"{len(done)} of 64 ended")
        there.clear()
        down = time.monotonic()
        cluster.prefill.stop()
        cluster.prefill.start()
        cluster.prefill.wait_until_healthy()
        wait_until(lambda: _routes(cluster), 60.0, lambda: "the router does not send anything to it")
        up = time.monotonic()
        there.set()
        for one in asked:
            one.result()
    answered = [one for one in done if one.token_ids is not None]
    # A router says so where prefill is not there; nothing but that may fail.
    refused = [one for one in done if one.error and (one.ended < down or one.began > up)]
    assert not refused, refused
    assert (
        len(done) == 64
        and any(one.began > up for one in answered)
        and any(one.ended < down for one in answered)
    )
    assert [one for one in answered if one.token_ids != cluster.alone(one.prompt)] == []
    slowest = max(one.ended - one.began for one in answered)
    assert slowest < up - down + TIMES["deadline_s"], f"{slowest:.1f} s"
    nothing_is_held(cluster)


class _Ended(NamedTuple):
    """A request: its answer, or why the router gave none; neither where the client hung up."""

    prompt: list[int]
    began: float
    ended: float
    token_ids: list[int] | None = None
    error: str = ""


def _routes(cluster: Cluster) -> bool:
    """Routers leave a server out for a while that did not answer them."""
    try:
        learn(cluster.concurrent)
    except (ServerError, OSError):
        return False
    return True


def _ask(
    cluster: Cluster, prompt: list[int], hangs_up: bool, there: threading.Event, done: list[_Ended]
) -> None:
    there.wait()
    began = time.monotonic()
    try:
        if hangs_up:
            hang_up(cluster, prompt)
            done.append(_Ended(prompt, began, time.monotonic()))
        else:
            answer = complete(cluster.concurrent.url, prompt, max_tokens=8)
            done.append(_Ended(prompt, began, time.monotonic(), answer.token_ids))
    except (ServerError, OSError) as error:
        done.append(_Ended(prompt, began, time.monotonic(), error=str(error)))


def hang_up(cluster: Cluster, prompt: list[int]) -> None:
    """Ask the router, and close the connection while prefill is busy."""
    body = {"model": "model", "prompt": prompt, "max_tokens": 8}
    with leaving(cluster.concurrent, "/v1/completions", body):
        time.sleep(0.3)


def nothing_is_held(cluster: Cluster) -> None:
    """Soon, and at the latest when leases are over."""
    expected = {"subscriptions": 0, "loads": 0, "on_offer": 0, "offers": 0}
    for server in (cluster.prefill, cluster.decode_shm):
        left: dict[str, float] = {}

        def empty(server: Process = server, left: dict[str, float] = left) -> bool:
            left.update(settled_gauges(server))
            return {name: left[name] for name in expected} == expected

        wait_until(empty, TIMES["lease_s"] + 5, lambda left=left: f"still held: {left}")  # type: ignore[misc]
