# SPDX-License-Identifier: Apache-2.0
"""Two ranks on either side: each moves its own heads."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration_tests.cluster import Cluster, bare_word, new_prompt, settled_gauges
from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.vllm import VllmOptions, complete, router, vllm_server


@pytest.mark.full  # test_conversion has two ranks on one side
def test_tp_2_hands_over_to_tp_2(scratch: Path, model: Path, secret: dict[str, str]) -> None:
    audit = scratch / "audit-tp.jsonl"
    audit.touch()
    bootstrap = free_port()
    options = VllmOptions(
        model, scratch, 2048, extra=("--dtype", "float32", "--tensor-parallel-size", "2"), env=secret
    )
    common = bare_word(audit_file=audit)
    first, second = core_halves()
    prefill = vllm_server("prefill-tp2", options, f"{common},bootstrap_port={bootstrap}", first)
    decode = vllm_server("decode-tp2", options, common, second)
    sequential = router(prefill, decode, scratch, dispatch="sequential", bootstrap_port=bootstrap)
    concurrent = router(prefill, decode, scratch)
    with running(prefill), running(decode), running(sequential, concurrent):
        proxy, address = TcpProxy(free_port()), f"http://127.0.0.1:{bootstrap}"
        pair = Cluster(model, prefill, decode, decode, sequential, concurrent, proxy, audit, address)
        for front in (sequential, concurrent, concurrent):  # which asks both at once the second time
            prompt = new_prompt(900)
            answer = complete(front.url, prompt, max_tokens=8)
            records = pair.audited(2)
            assert answer.token_ids == pair.alone(prompt)
            by_rank = {rank: {r["sha256"] for r in records if r["rank"] == rank} for rank in (0, 1)}
            assert all(len(digests) == 1 for digests in by_rank.values()), records
            assert by_rank[0] != by_rank[1], "the ranks hold different heads"
        left = settled_gauges(prefill)
        assert (left["on_offer"], left["kv_cache_usage_perc"]) == (0, 0), "free when both ranks said so"
