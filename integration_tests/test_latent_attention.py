# SPDX-License-Identifier: Apache-2.0
"""Latent attention (MLA) on real SGLang servers: both prefill ranks hold the same latents, decode reads one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from baselines.sides import PLUGINS
from integration_tests.cluster import new_prompt, wait_until
from integration_tests.latent_model import LATENT, LAYERS, ROPE
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.sglang import (
    DECODE,
    ON_CPU,
    PREFILL,
    SglangOptions,
    SglangProcess,
    generate,
    generate_on_pair,
    sglang_server,
)

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="runs in SGLang's environment")

TIMES = {"lease_s": 8, "deadline_s": 30, "unmatched_timeout_s": 8}


class Servers(NamedTuple):
    prefill: SglangProcess
    decode: SglangProcess
    alone: SglangProcess
    audit: Path


@pytest.fixture(scope="module")
def servers(scratch: Path, secret: dict[str, str]) -> Iterator[Servers]:
    audit = scratch / "audit-latent.jsonl"
    audit.touch()
    # SGLang's torch_native attention can't prefill latents in the form it chooses; the plugin makes
    # it choose the absorbed one.
    env = {"SAGE_KVT_ABSORBED_MLA": "1", "PYTHONPATH": os.pathsep.join([str(ON_CPU), str(PLUGINS)])}
    model = scratch / "latent-model"
    subprocess.run(
        [sys.executable, "-m", "integration_tests.latent_model", str(model)], env=os.environ | env, check=True
    )
    options = SglangOptions(
        model, scratch, 2048, 8192,
        # fp32, so that two ranks sum to the same tokens as one.
        ("--dtype", "float32", "--chunked-prefill-size", "512", "--disable-radix-cache"), secret | env,
    )  # fmt: skip
    first, second = core_halves()
    common: dict[str, object] = {"audit_file": audit, **TIMES}
    prefill = sglang_server(
        "latent-prefill", options, PREFILL, first, transport=common, tp_size=2, extra=("--page-size", "16")
    )
    decode = sglang_server(
        "latent-decode", options, DECODE, second, transport=common, extra=("--page-size", "64")
    )
    alone = sglang_server("latent-alone", options, None, first, extra=("--page-size", "16"))
    with running(prefill, decode, alone):
        yield Servers(prefill, decode, alone, audit)


@pytest.mark.parametrize("tokens", [100, 600])
def test_latents_come_from_one_of_the_ranks_that_hold_them(servers: Servers, tokens: int) -> None:
    prompt = new_prompt(tokens, seed=tokens)
    answer = generate_on_pair(servers.prefill, servers.decode, prompt, max_tokens=8)
    assert answer.token_ids == generate(servers.alone.url, prompt, max_tokens=8).token_ids
    found: list[dict[str, object]] = []

    def both() -> bool:
        found[:] = [json.loads(line) for line in servers.audit.read_text().splitlines()]
        return len(found) >= 2

    wait_until(both, 10.0, lambda: f"{len(found)} audit records of 2")
    servers.audit.write_text("")
    assert {record["side"] for record in found} == {"producer", "consumer"}
    assert found[0]["sha256"] == found[1]["sha256"]
    pages = -(-tokens // 64)
    assert found[0]["nbytes"] == pages * 64 * LAYERS * (LATENT + ROPE) * 4
    assert "transfer failed" not in servers.prefill.log.read_text()
