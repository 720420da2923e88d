# SPDX-License-Identifier: Apache-2.0
"""vLLM's servers over the libraries that a site has: same token ids, same KV bytes, and they did move them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration_tests.cluster import PREFILL_PARAMS, TIMES, new_prompt, wait_until
from sage_kv_connector.backends import lacks
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.vllm import VllmOptions, complete, vllm_server

MAX_MODEL_LEN = 8192
LENGTHS = (129, 2000, 6000)
LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(lacks(name)), reason=lacks(name)))
    for name in ("nixl", "mooncake")
]


class Carried(NamedTuple):
    """Servers over one library."""

    backend: str
    prefill: Process
    decode: Process
    audit: Path

    def hand_over(self, prompt: list[int]) -> list[int]:
        first = complete(
            self.prefill.url, prompt, max_tokens=1, kv_transfer_params=PREFILL_PARAMS, stream=False
        )
        assert first.kv_transfer_params is not None
        return complete(
            self.decode.url, prompt, max_tokens=8, kv_transfer_params=first.kv_transfer_params
        ).token_ids

    def alone(self, prompt: list[int]) -> list[int]:
        return complete(self.prefill.url, prompt, max_tokens=8).token_ids

    def audited(self) -> list[dict[str, Any]]:
        """Both sides' records of one transfer; empties the file."""
        records: list[dict[str, Any]] = []

        def complete_records() -> bool:
            records[:] = [json.loads(line) for line in self.audit.read_text().splitlines()]
            return len(records) >= 2

        wait_until(complete_records, 10.0, lambda: f"{len(records)} audit records of 2")
        self.audit.write_text("")
        return records


@pytest.fixture(scope="module", params=LIBRARIES)
def carried(
    request: pytest.FixtureRequest, scratch: Path, model: Path, secret: dict[str, str]
) -> Iterator[Carried]:
    name = request.param
    audit = scratch / f"audit-{name}.jsonl"
    audit.touch()
    extra = ("--dtype", "float32", "--max-num-batched-tokens", "2048", "--no-enable-prefix-caching")
    options = VllmOptions(model, scratch, MAX_MODEL_LEN, extra=extra, env=secret)
    given = {"host": "127.0.0.1", "backend": name, "security": "none", "audit_file": audit, **TIMES}
    words = "sage_kvt:" + ",".join(f"{key}={value}" for key, value in given.items())
    first, second = core_halves()
    prefill = vllm_server(f"prefill-{name}", options, words, first)
    decode = vllm_server(f"decode-{name}", options, words, second)
    with running(prefill, decode):
        servers = Carried(name, prefill, decode, audit)
        prompt = new_prompt(300)  # the path is set up beside it
        assert servers.hand_over(prompt) == servers.alone(prompt)
        servers.audited()
        yield servers


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_library_carries_a_hand_over(carried: Carried, tokens: int) -> None:
    prompt = new_prompt(tokens)
    assert carried.hand_over(prompt) == carried.alone(prompt)
    records = carried.audited()
    assert {record["side"] for record in records} == {"producer", "consumer"}
    assert records[0]["sha256"] == records[1]["sha256"]
    assert {record["backend"] for record in records} == {carried.backend}
    assert {record["mode"] for record in records} == {carried.backend}
    assert all(record["checksum"] for record in records)
    assert records[0]["nbytes"] == -(-tokens // 128) * 128 * 4096
    assert f"KV goes by {carried.backend}\n" in carried.decode.log.read_text()
