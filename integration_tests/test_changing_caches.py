# SPDX-License-Identifier: Apache-2.0
"""Weights and caches of running servers change: what is handed over belongs to both sides' present ones."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration_tests.cluster import TIMES, bare_word, gauges, new_prompt, settled_gauges, wait_until
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.vllm import PREFILL_PARAMS, VllmOptions, complete, vllm_server


class Pair:
    def __init__(self, prefill: Process, decode: Process, audit: Path) -> None:
        self.prefill, self.decode, self.audit = prefill, decode, audit

    def prefilled(self, prompt: list[int]) -> dict[str, Any]:
        first = complete(
            self.prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False
        )
        assert first.kv_transfer_params is not None
        return first.kv_transfer_params

    def is_right(self, prompt: list[int], params: dict[str, Any]) -> bool:
        """Whether decode's answer is the one of a server that computes everything itself."""
        answer = complete(self.decode.url, prompt, max_tokens=8, kv_transfer_params=params)
        return answer.token_ids == complete(self.prefill.url, prompt, max_tokens=8).token_ids

    def moved(self) -> bool:
        """Whether KV arrived since this was asked last; both sides' bytes are compared."""
        time.sleep(0.5)
        records = [json.loads(line) for line in self.audit.read_text().splitlines()]
        self.audit.write_text("")
        assert len({record["sha256"] for record in records}) <= 1
        return len(records) == 2


def post(server: Process, path: str, body: dict[str, Any] | None = None) -> int:
    data = b"" if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return int(response.status)


@pytest.fixture(scope="module")
def pair(scratch: Path, model: Path, secret: dict[str, str]) -> Iterator[Pair]:
    audit = scratch / "audit-changing.jsonl"
    audit.touch()
    env = {**secret, "VLLM_SERVER_DEV_MODE": "1"}
    options = VllmOptions(model, scratch, 4096, extra=("--dtype", "float32"), env=env)
    first, second = core_halves()
    words = bare_word(audit_file=audit)
    prefill = vllm_server("prefill-changing", options, words, first)
    decode = vllm_server("decode-changing", options, words, second)
    with running(prefill, decode):
        yield Pair(prefill, decode, audit)


def test_kv_of_other_weights_is_computed_until_both_servers_have_them(pair: Pair) -> None:
    prompt = new_prompt(500)
    assert pair.is_right(prompt, pair.prefilled(prompt)) and pair.moved()
    held = new_prompt(500)
    params = pair.prefilled(held)
    assert post(pair.prefill, "/update_weight_version", {"new_version": "7"}) == 200
    assert pair.is_right(held, params) and not pair.moved()
    other = new_prompt(500)
    assert pair.is_right(other, pair.prefilled(other)) and not pair.moved()
    assert post(pair.decode, "/update_weight_version", {"new_version": "7"}) == 200
    time.sleep(0.5)
    last = new_prompt(500)
    assert pair.is_right(last, pair.prefilled(last)) and pair.moved()


def test_a_reset_frees_what_waits_to_be_fetched(pair: Pair) -> None:
    prompt = new_prompt(500)
    params = pair.prefilled(prompt)
    post(pair.prefill, "/reset_prefix_cache?reset_external=true")
    wait_until(lambda: settled_gauges(pair.prefill)["on_offer"] == 0, TIMES["lease_s"] / 2)
    assert pair.is_right(prompt, params) and not pair.moved()
    again = new_prompt(500)
    assert pair.is_right(again, pair.prefilled(again)) and pair.moved()


@pytest.mark.parametrize("which", ["prefill", "decode"])
def test_a_server_that_was_put_to_sleep_hands_over_when_it_is_awake(pair: Pair, which: str) -> None:
    """On a CPU vLLM 0.32 only pauses and resets; requests of that time wait."""
    server: Process = getattr(pair, which)
    assert post(server, "/sleep?level=1") == 200
    assert post(server, "/wake_up") == 200
    prompt = new_prompt(500)
    assert pair.is_right(prompt, pair.prefilled(prompt)) and pair.moved()
    assert gauges(pair.prefill)["on_offer"] == 0
