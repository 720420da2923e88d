# SPDX-License-Identifier: Apache-2.0
"""A model with sliding windows on real SGLang servers with hybrid pools: all pages of the layers that keep everything
and the windows' are handed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from integration_tests.cluster import new_prompt, wait_until
from integration_tests.window_model import HEAD_DIM, KV_HEADS, SERVERS_ENV, WINDOW, WINDOWED
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.sglang import (
    DECODE,
    PREFILL,
    SglangOptions,
    SglangProcess,
    generate,
    generate_on_pair,
    sglang_server,
)

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="runs in SGLang's environment")

TIMES = {"lease_s": 8, "deadline_s": 30, "unmatched_timeout_s": 8}
PAGE, LARGER = 16, 32
#: K and V of one layer's token in fp32.
LAYER_BYTES = 2 * KV_HEADS * HEAD_DIM * 4
HYBRID = "SWAKVPool mem usage"


class Servers(NamedTuple):
    prefill: SglangProcess
    decode: SglangProcess
    larger_pages: SglangProcess
    alone: SglangProcess
    audit: Path


@pytest.fixture(scope="module")
def servers(scratch: Path, secret: dict[str, str]) -> Iterator[Servers]:
    audit = scratch / "audit-windows.jsonl"
    audit.touch()
    model = scratch / "window-model"
    subprocess.run(
        [sys.executable, "-m", "integration_tests.window_model", str(model)],
        env=os.environ | SERVERS_ENV,
        check=True,
    )
    options = SglangOptions(
        model,
        scratch,
        2048,
        8192,
        ("--dtype", "float32", "--chunked-prefill-size", "256"),
        secret | SERVERS_ENV,
    )
    first, second = core_halves()
    common: dict[str, object] = {"audit_file": audit, **TIMES}
    no_cache = "--disable-radix-cache"
    prefill = sglang_server(
        "windows-prefill", options, PREFILL, first, transport=common,
        extra=("--page-size", str(PAGE), no_cache),
    )  # fmt: skip
    decode = sglang_server(
        "windows-decode", options, DECODE, second, transport=common,
        extra=("--page-size", str(PAGE), "--disaggregation-decode-enable-radix-cache"),
    )  # fmt: skip
    larger = sglang_server(
        "windows-decode-tcp", options, DECODE, second, transport={**common, "backend": "tcp"},
        extra=("--page-size", str(LARGER), no_cache),
    )  # fmt: skip
    alone = sglang_server(
        "windows-alone", options, None, first,
        extra=("--page-size", str(PAGE), no_cache, "--disable-hybrid-swa-memory"),
    )  # fmt: skip
    with running(prefill, decode, larger, alone):
        for server in (prefill, decode, larger):
            assert HYBRID in server.log.read_text()
        assert HYBRID not in alone.log.read_text()
        yield Servers(prefill, decode, larger, alone, audit)


def audited(servers: Servers) -> list[dict[str, Any]]:
    """The two sides' records of the last transfer."""
    found: list[dict[str, Any]] = []

    def both() -> bool:
        found[:] = [json.loads(line) for line in servers.audit.read_text().splitlines()]
        return len(found) >= 2

    wait_until(both, 10.0, lambda: f"{len(found)} audit records of 2")
    servers.audit.write_text("")
    assert {record["side"] for record in found} == {"producer", "consumer"}
    assert found[0]["sha256"] == found[1]["sha256"]
    return found


def nbytes(full_tokens: int, window_tokens: int) -> int:
    windowed = sum(WINDOWED)
    return (full_tokens * (len(WINDOWED) - windowed) + window_tokens * windowed) * LAYER_BYTES


#: Shorter than the window, its size, and more; at borders of pages and beside them; of one chunk, and of several.
TOKENS = [7, 200, 256, 257, 271, 272, 273, 700, 1024, 1500]


@pytest.mark.parametrize("tokens", TOKENS)
def test_full_pages_and_those_of_the_window_cross_and_nothing_else(servers: Servers, tokens: int) -> None:
    prompt = new_prompt(tokens, seed=tokens)
    answer = generate_on_pair(servers.prefill, servers.decode, prompt, max_tokens=24)
    assert answer.token_ids == generate(servers.alone.url, prompt, max_tokens=24).token_ids
    end = -(-tokens // PAGE) * PAGE
    begin = max(0, tokens - WINDOW) // PAGE * PAGE
    assert audited(servers)[0]["nbytes"] == nbytes(end, end - begin)


@pytest.mark.parametrize("tokens", TOKENS)
def test_larger_pages_over_tcp(servers: Servers, tokens: int) -> None:
    prompt = new_prompt(tokens, seed=tokens + 1)
    answer = generate_on_pair(servers.prefill, servers.larger_pages, prompt, max_tokens=24)
    assert answer.token_ids == generate(servers.alone.url, prompt, max_tokens=24).token_ids
    end = -(-tokens // LARGER) * LARGER
    assert audited(servers)[0]["nbytes"] == nbytes(end, end - max(0, tokens - WINDOW))


def test_what_decode_has_in_its_prefix_cache_is_not_asked_for(servers: Servers) -> None:
    """SGLang's decode takes a prefix that ends before the window, and all of the window anew."""
    known = new_prompt(512, seed=1)
    generate_on_pair(servers.prefill, servers.decode, known, max_tokens=4)
    audited(servers)
    prompt = known + new_prompt(700, seed=2)
    answer = generate_on_pair(servers.prefill, servers.decode, prompt, max_tokens=24)
    assert answer.token_ids == generate(servers.alone.url, prompt, max_tokens=24).token_ids
    end = -(-len(prompt) // PAGE) * PAGE
    begin = (len(prompt) - WINDOW) // PAGE * PAGE
    assert audited(servers)[0]["nbytes"] == nbytes(end - 512, end - begin)
