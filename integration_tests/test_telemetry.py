# SPDX-License-Identifier: Apache-2.0
"""What real vLLM servers say of a load that was counted beside them; ``make check-telemetry`` does more of it."""

from __future__ import annotations

from pathlib import Path

from integration_tests.cluster import Cluster, settled_gauges
from integration_tests.telemetry_pair import WatchedPair, exporter_of
from integration_tests.telemetry_phases import CHECKS, PAIR, Verdict, run_phase
from integration_tests.telemetry_vllm import VllmLoad
from sage_kv_connector.launch.process import running
from sage_kv_connector.telemetry.recording.publishing import directory


def test_bytes_and_failures_are_those_that_were_sent_and_injected(cluster: Cluster, scratch: Path) -> None:
    exporter = exporter_of(directory(), scratch)

    def settle() -> None:
        for server in (cluster.prefill, cluster.decode_tcp):
            settled_gauges(server)

    verdict = Verdict("vllm")
    with running(exporter):
        pair = WatchedPair(cluster.prefill, cluster.decode_tcp, exporter, cluster.proxy, settle, "none")
        run_phase(VllmLoad(pair, cluster.bootstrap), verdict, PAIR, ("prompt", "bootstrap", "flipped"))
    assert verdict.wrong == {check: [] for check in CHECKS}
    assert {row["bytes"]["transfers"] for row in verdict.rows} == {17, 1}, "something was sent"
    failures = [row["failures"]["said"] for row in verdict.rows if row["role"] == "decode"]
    assert failures[-1]['failed_loads_total{code="checksum"}'] == 1
    cluster.audit.write_text("")
