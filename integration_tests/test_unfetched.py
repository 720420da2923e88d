# SPDX-License-Identifier: Apache-2.0
"""Prefills that wait to be fetched while vLLM sleeps: their blocks come back when something needs them."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from integration_tests.cluster import TIMES, bare_word, gauges, new_prompt, settled_gauges
from integration_tests.test_changing_caches import Pair, post
from sage_kv_connector.integrations.vllm.held_blocks import LINGER_S
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.vllm import VllmOptions, complete, vllm_server

PAGE, BLOCKS = 32, 100
#: A prompt takes more than half of the pool, so that two don't fit.
LARGE = 60 * PAGE


@pytest.fixture(scope="module")
def pair(scratch: Path, model: Path, secret: dict[str, str]) -> Iterator[Pair]:
    audit = scratch / "audit-unfetched.jsonl"
    audit.touch()
    env = {**secret, "VLLM_SERVER_DEV_MODE": "1"}
    pool = ("--num-gpu-blocks-override", str(BLOCKS))
    options = VllmOptions(
        model, scratch, LARGE + 64, block_size=PAGE, extra=("--dtype", "float32", *pool), env=env
    )
    first, second = core_halves()
    words = bare_word(audit_file=audit)
    prefill = vllm_server("prefill-unfetched", options, words, first)
    decode = vllm_server("decode-unfetched", options, words, second)
    with running(prefill, decode):
        yield Pair(prefill, decode, audit)


def fetched(pair: Pair, prompt: list[int], params: dict[str, Any]) -> bool:
    """Decode answers; whether the pages arrived."""
    complete(pair.decode.url, prompt, max_tokens=8, kv_transfer_params=params)
    return pair.moved()


def sleeps() -> None:
    """Nothing comes until vLLM makes no more steps."""
    time.sleep(LINGER_S + 1)


def test_a_request_waits_for_blocks_no_longer_than_until_they_were_fetched(pair: Pair) -> None:
    prompt, other = new_prompt(LARGE), new_prompt(LARGE)
    params = pair.prefilled(prompt)
    sleeps()
    assert fetched(pair, prompt, params)
    assert gauges(pair.prefill)["on_offer"] == 1, "vLLM was told without a step?"
    answer = complete(pair.prefill.url, other, max_tokens=8)
    assert answer.total_s < TIMES["lease_s"] / 2
    assert answer.token_ids == complete(pair.decode.url, other, max_tokens=8).token_ids
    left = settled_gauges(pair.prefill)
    assert (left["on_offer"], left["kv_cache_usage_perc"]) == (0, 0)


def test_a_request_waits_for_blocks_until_a_lease_is_over(pair: Pair) -> None:
    pair.prefilled(new_prompt(LARGE))
    other = new_prompt(LARGE)
    answer = complete(pair.prefill.url, other, max_tokens=8)
    assert TIMES["lease_s"] - 2 < answer.total_s < TIMES["lease_s"] + 3
    assert answer.token_ids == complete(pair.decode.url, other, max_tokens=8).token_ids


def test_pages_that_are_held_are_the_ones_that_were_computed(pair: Pair) -> None:
    """Others run meanwhile, in all blocks that are left."""
    prompt = new_prompt(LARGE)
    params = pair.prefilled(prompt)
    for _ in range(6):
        complete(pair.prefill.url, new_prompt(30 * PAGE), max_tokens=4)
    assert pair.is_right(prompt, params) and pair.moved()


def reset(server: Process) -> bool:
    """Whether vLLM could reset its prefix cache."""
    request = urllib.request.Request(server.url + "/reset_prefix_cache", b"")
    with urllib.request.urlopen(request, timeout=60) as response:
        return bool(json.load(response)["success"])


def test_a_reset_is_possible_when_it_is_asked_for_again(pair: Pair) -> None:
    prompt = new_prompt(LARGE)
    params = pair.prefilled(prompt)
    sleeps()
    assert not reset(pair.prefill)
    sleeps()
    assert fetched(pair, prompt, params)
    assert not reset(pair.prefill)
    assert reset(pair.prefill)


def test_a_server_is_put_to_sleep_once_what_it_holds_was_fetched(pair: Pair) -> None:
    """On a CPU vLLM 0.32 only pauses and resets."""
    prompt = new_prompt(LARGE)
    params = pair.prefilled(prompt)
    sleeps()
    with ThreadPoolExecutor(1) as pool:
        asleep = pool.submit(post, pair.prefill, "/sleep?level=1")
        time.sleep(1)
        assert not asleep.done()
        assert fetched(pair, prompt, params)
        assert asleep.result(2) == 200
    assert post(pair.prefill, "/wake_up") == 200
    again = new_prompt(LARGE)
    assert pair.is_right(again, pair.prefilled(again)) and pair.moved()
