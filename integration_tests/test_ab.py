# SPDX-License-Identifier: Apache-2.0
"""The comparison of connectors in its smallest form: real servers in two network namespaces, a link of 1 Gb/s."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sage_kv_connector.bench.ab.links import IPERF_S, two_hosts
from sage_kv_connector.bench.ab.rounds import SHAPE
from sage_kv_connector.cli.bench import bench
from sage_kv_connector.launch.tiny_model import SHAPES


def test_the_smallest_suite(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("iperf3") is None:
        pytest.skip("a link between two hosts wants root, iproute2 and iperf3")
    state, out = tmp_path / "state", tmp_path / "out"
    words = ["ab", "--suite", "ci", "--json", "--state", str(state), "--out", str(out)]
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(out.read_text()) and not result["missing"]
    cases = {case["arm"]: case for case in result["cases"]}
    assert set(cases) == {"ours-bf16", "ours-int4"}
    for case in cases.values():
        assert case["requests"] == 4 and not case["failed"] and case["judged"] == 4, case
        assert 0 < case["ttft_p50_s"] <= case["ttft_p99_s"] and case["throughput"] > 0
        assert case["cpu_s"]["decode"]["engine"] > 0 and case["memory_bytes"] > 1 << 28
    assert cases["ours-bf16"]["wrong"] == 0
    kv_bytes = 4096 * SHAPES[SHAPE].kv_bytes_per_token
    assert kv_bytes < cases["ours-bf16"]["wire_bytes"] < 1.1 * kv_bytes  # headers, and what was sent again
    assert cases["ours-int4"]["wire_bytes"] < 0.35 * kv_bytes
    assert 100e6 < result["links"]["1g"]["payload_bytes_s"] < 125e6
    # A second run finds all done, and starts no server.
    again = CliRunner().invoke(bench, words)
    assert json.loads(again.stdout.splitlines()[-1])["cases"] == result["cases"]


def test_a_host_and_all_in_it_are_gone_at_its_end() -> None:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces want root and iproute2")
    before = set(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else set()
    with two_hosts(100) as hosts:
        assert {host.namespace for host in hosts} == set(os.listdir("/run/netns")) - before
        assert hosts.sent_bytes() < 10_000 * IPERF_S
    assert set(os.listdir("/run/netns")) == before
