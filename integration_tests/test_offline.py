# SPDX-License-Identifier: Apache-2.0
"""``LLM(kv_transfer_config=…)``, by the bare word and by an object."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from integration_tests.cluster import TIMES, Cluster, new_prompt


@pytest.mark.parametrize("form", ["word", pytest.param("object", marks=pytest.mark.full)])
def test_an_offline_llm_decodes_what_a_server_prefilled(
    cluster: Cluster, secret: dict[str, str], form: str
) -> None:
    prompt = new_prompt(700)
    options = {"host": "127.0.0.1", "audit_file": str(cluster.audit), **TIMES}
    cluster.audit.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "integration_tests.offline_decode", form, str(cluster.model),
         cluster.prefill.url, json.dumps(options), json.dumps(prompt)],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, **secret, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = cluster.audited(1)
    assert records[0]["sha256"] == records[1]["sha256"]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOKEN_IDS ")]
    assert json.loads(line.removeprefix("TOKEN_IDS ")) == cluster.alone(prompt)


def test_a_wrong_option_ends_the_start_with_its_name(cluster: Cluster, secret: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "integration_tests.offline_decode", "word", str(cluster.model),
         cluster.prefill.url, json.dumps({"chunk_sise": 5}), "[1]"],
        capture_output=True, text=True, timeout=200, env={**os.environ, **secret},
    )  # fmt: skip
    assert done.returncode != 0
    assert "chunk_sise" in done.stderr
