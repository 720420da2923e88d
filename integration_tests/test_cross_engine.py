# SPDX-License-Identifier: Apache-2.0
"""A prompt prefilled by vLLM is decoded by SGLang, and the other way round; both engines unmodified.

Runs in SGLang's environment, with vLLM's servers from theirs (``make test-sglang``). All sizes differ:
page size, tensor parallel size, and the order of elements in a page.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration_tests.cluster import PREFILL_PARAMS, wait_until
from integration_tests.recall import MODEL, recall_prompt, words
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, core_halves, running
from sage_kv_connector.launch.sglang import (
    DECODE,
    PREFILL,
    SglangOptions,
    SglangProcess,
    generate,
    room_at,
    sglang_server,
)
from sage_kv_connector.launch.vllm import VllmOptions, complete, vllm_server

pytestmark = pytest.mark.skipif(
    find_spec("sglang") is None or "SAGE_KVT_VLLM_SCRIPTS" not in os.environ,
    reason="runs in SGLang's environment, with vLLM's beside it",
)

TIMES = {"lease_s": 8, "deadline_s": 20, "peer_timeout_s": 15, "unmatched_timeout_s": 6}
EXAMPLE = Path(__file__).parent.parent / "examples" / "between_engines.py"
#: SGLang's pages are smaller than vLLM's where it prefills and larger where it decodes.
PREFILL_PAGE, VLLM_PAGE, DECODE_PAGE = "32", 128, "256"


class Engines(NamedTuple):
    """vLLM does both; ``bootstrap_port`` is that of its prefill."""

    vllm: Process
    bootstrap_port: int
    prefill: SglangProcess
    decode: SglangProcess
    audit: Path

    def alone(self, prompt: list[int]) -> list[int]:
        """What one server says that computes the whole prompt."""
        return complete(self.vllm.url, prompt, max_tokens=8).token_ids


@pytest.fixture(scope="module")
def engines(scratch: Path, secret: dict[str, str]) -> Iterator[Engines]:
    audit, bootstrap_port = scratch / "audit-cross.jsonl", free_port()
    audit.touch()
    first, second = core_halves()
    common: dict[str, object] = {"audit_file": audit, **TIMES}
    options = SglangOptions(
        MODEL, scratch, 2048, 16384, ("--dtype", "bfloat16", "--chunked-prefill-size", "256"), secret
    )
    prefill = sglang_server(
        "cross-sglang-prefill", options, PREFILL, first, transport=common, tp_size=2,
        extra=("--page-size", PREFILL_PAGE),
    )  # fmt: skip
    decode = sglang_server(
        "cross-sglang-decode", options, DECODE, second, transport={**common, "backend": "tcp"}, tp_size=2,
        extra=("--page-size", DECODE_PAGE, "--disable-radix-cache"),
    )  # fmt: skip
    transport = {"host": "127.0.0.1", "bootstrap_port": bootstrap_port, **common}
    vllm = vllm_server(
        "cross-vllm",
        VllmOptions(
            MODEL, scratch, 2048, block_size=VLLM_PAGE, env=secret,
            extra=("--dtype", "bfloat16", "--max-num-batched-tokens", "256", "--no-enable-prefix-caching"),
            scripts=Path(os.environ["SAGE_KVT_VLLM_SCRIPTS"]),
        ),
        "sage_kvt:" + ",".join(f"{key}={value}" for key, value in transport.items()),
        first,
    )  # fmt: skip
    with running(vllm, prefill, decode):
        yield Engines(vllm, bootstrap_port, prefill, decode, audit)


def parts_of(engines: Engines, side: str, records: int) -> list[str]:
    """The parts that this side's records name, each with its digest."""
    found: list[dict[str, Any]] = []

    def all_there() -> bool:
        lines = [json.loads(line) for line in engines.audit.read_text().splitlines()]
        found[:] = [record for record in lines if record["side"] == side]
        return len(found) >= records

    wait_until(all_there, 10.0, lambda: f"{len(found)} records of the {side} of {records}")
    return sorted(part for record in found for part in record["parts"])


def assert_same_elements(engines: Engines, producers: int, consumers: int) -> None:
    sent, received = parts_of(engines, "producer", producers), parts_of(engines, "consumer", consumers)
    assert sent == received and len(sent) > 0
    engines.audit.write_text("")


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("tokens", [90, 331, 1024])
def test_vllm_prefills_and_sglang_decodes(engines: Engines, tokens: int, together: bool) -> None:
    prompt, expected = recall_prompt(tokens, tokens)
    room = room_at(engines.bootstrap_port)
    in_vllm = {**PREFILL_PARAMS, "bootstrap_room": room["bootstrap_room"]}

    def prefill() -> list[int]:
        return complete(engines.vllm.url, prompt, max_tokens=1, kv_transfer_params=in_vllm).token_ids

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(prefill)
        if not together:
            asked.result(60)
        answer = generate(engines.decode.url, prompt, max_tokens=8, bootstrap=room)
        assert asked.result(60) == expected[:1]
    assert answer.token_ids == expected
    assert_same_elements(engines, 1, 2)


@pytest.mark.parametrize("tokens", [90, 331, 1024])
def test_sglang_prefills_and_vllm_decodes(engines: Engines, tokens: int) -> None:
    prompt, _ = recall_prompt(tokens + 1, tokens)
    expected = engines.alone(prompt)
    room = room_at(engines.prefill.bootstrap_port)
    in_vllm = {"do_remote_prefill": True, "do_remote_decode": False, **room}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate, engines.prefill.url, prompt, max_tokens=1, bootstrap=room)
        answer = complete(engines.vllm.url, prompt, max_tokens=8, kv_transfer_params=in_vllm)
        assert asked.result(60).token_ids == expected[:1]
    assert answer.token_ids == expected
    assert_same_elements(engines, 2, 2)


def test_many_at_once_both_ways(engines: Engines) -> None:
    prompts = [recall_prompt(100 + seed, 200 + 60 * seed)[0] for seed in range(6)]
    expected = [engines.alone(prompt) for prompt in prompts]

    def to_sglang(prompt: list[int]) -> list[int]:
        room = room_at(engines.bootstrap_port)
        params = {**PREFILL_PARAMS, "bootstrap_room": room["bootstrap_room"]}
        with ThreadPoolExecutor(1) as pool:
            pool.submit(complete, engines.vllm.url, prompt, max_tokens=1, kv_transfer_params=params)
            return generate(engines.decode.url, prompt, max_tokens=8, bootstrap=room).token_ids

    def to_vllm(prompt: list[int]) -> list[int]:
        room = room_at(engines.prefill.bootstrap_port)
        params = {"do_remote_prefill": True, "do_remote_decode": False, **room}
        with ThreadPoolExecutor(1) as pool:
            pool.submit(generate, engines.prefill.url, prompt, max_tokens=1, bootstrap=room)
            return complete(engines.vllm.url, prompt, max_tokens=8, kv_transfer_params=params).token_ids

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda at: (to_sglang, to_vllm)[at % 2](prompts[at]), range(len(prompts))))
    assert answers == expected
    engines.audit.write_text("")


def test_the_example_goes_both_ways(engines: Engines) -> None:
    tokens, _ = recall_prompt(3, 600)
    prompt = " ".join(words()[token] for token in tokens)
    vllm, sglang = ("vllm", engines.vllm.url), ("sglang", engines.decode.url)
    first = ("sglang", engines.prefill.url, engines.prefill.bootstrap_port)
    answers = []
    for prefill, decode in (((*vllm, engines.bootstrap_port), sglang), (first, vllm)):
        done = subprocess.run(
            [sys.executable, str(EXAMPLE), *map(str, prefill), *decode, prompt],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert_same_elements(engines, 3, 4)
    alone = {"model": "model", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        f"{engines.vllm.url}/v1/completions", json.dumps(alone).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        expected = json.load(response)["choices"][0]["text"]
    assert answers[0].split() == answers[1].split() == expected.split()


def test_what_vllm_never_prefills_is_a_named_failure_in_sglang(engines: Engines) -> None:
    prompt, _ = recall_prompt(7, 300)
    begun = time.monotonic()
    with pytest.raises(ServerError, match="no prefill with this transfer id"):
        generate(engines.decode.url, prompt, max_tokens=8, bootstrap=room_at(engines.bootstrap_port))
    assert time.monotonic() - begun < 15


def test_a_room_that_names_nothing_is_computed_by_vllm(engines: Engines) -> None:
    prompt, expected = recall_prompt(8, 300)
    params = {
        "do_remote_prefill": True,
        **room_at(engines.prefill.bootstrap_port),
        "bootstrap_room": -1,
    }
    assert complete(engines.vllm.url, prompt, max_tokens=8, kv_transfer_params=params).token_ids == expected
    assert "bootstrap_room is -1" in engines.vllm.log.read_text()


def test_a_dead_sglang_prefill_costs_vllm_a_recompute(engines: Engines) -> None:
    """The last test: it ends SGLang's prefill server."""
    prompt, expected = recall_prompt(9, 600)
    engines.prefill.stop(signal.SIGKILL)
    params = {"do_remote_prefill": True, **room_at(engines.prefill.bootstrap_port)}
    assert complete(engines.vllm.url, prompt, max_tokens=8, kv_transfer_params=params).token_ids == expected
    assert "did not arrive" in engines.vllm.log.read_text()
