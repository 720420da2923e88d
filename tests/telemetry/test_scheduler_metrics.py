# SPDX-License-Identifier: Apache-2.0
"""SGLang's way: scheduler processes write into a folder, and its HTTP server shows what they wrote, all together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families as text_metrics

RANK = """
import sys
from types import SimpleNamespace
from sage_kv_connector.integrations.sglang.metrics import scheduler_metrics
from sage_kv_connector.telemetry.recording.recorder import Recorder
from sage_kv_connector.telemetry.recording.snapshot import Sample, Snapshot, TransferRecord

rank, transfers, switched_on = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "on"
recorder = Recorder()

def snapshot():
    samples = (*recorder.samples(), Sample("sessions", (), 1))
    return Snapshot("e", rank, 1, 1.0, 0, samples, tuple(recorder.times()))

core = SimpleNamespace(recorder=recorder, snapshot=snapshot)
args = SimpleNamespace(enable_metrics=switched_on, served_model_name="m")
metrics = scheduler_metrics(core, args, {"tp_rank": rank})
assert (metrics is not None) == switched_on
for number in range(transfers):
    stages = (("wire", 0.25),)
    recorder.ended(TransferRecord("t", "prefill", "p", "tcp", "same", 0, 10, 10, 0, 0.25, stages))
if metrics is not None:
    metrics.close()
"""
#: Nothing is transferred, and nobody ends it.
REFUSING = (
    RANK.partition("for number")[0]
    + """
recorder.add("failed_loads_total", ("bootstrap",))
sys.stdin.read()
"""
)


def shown(folder: Path) -> dict[tuple[str, str], float]:
    """What SGLang's /metrics shows: name and tp_rank → the sum of the samples."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    found: dict[tuple[str, str], float] = {}
    families = text_metrics(generate_latest(registry).decode())
    for family in families:
        for sample in family.samples:
            key = sample.name, sample.labels.get("tp_rank", "")
            found[key] = found.get(key, 0.0) + sample.value
    return found


def run_rank(folder: Path, rank: int, transfers: int, on: str = "on") -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", RANK, str(rank), str(transfers), on]
    subprocess.run(command, env=environment, check=True, timeout=60)


def test_each_rank_shows_its_own_and_nothing_is_lost(tmp_path: Path) -> None:
    for rank, transfers in ((0, 3), (1, 5)):
        run_rank(tmp_path, rank, transfers)
    found = shown(tmp_path)
    assert found["sglang:sage_kvt_transfers_total", "0"] == 3
    assert found["sglang:sage_kvt_transfers_total", "1"] == 5
    assert found["sglang:sage_kvt_stage_seconds_sum", "1"] == 5 * 0.25
    assert found["sglang:sage_kvt_transferred_bytes_total", "0"] == 30
    assert found["sglang:sage_kvt_sessions", "1"] == 1
    assert found["sglang:sage_kvt_failed_loads_total", "0"] == 0, "shown before there is one"


def test_a_failure_without_a_transfer_is_shown_when_it_happens(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", REFUSING, "0", "0", "on"]
    rank = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    try:
        until = time.monotonic() + 20
        while not shown(tmp_path).get(("sglang:sage_kvt_failed_loads_total", "0")):
            assert time.monotonic() < until, "it is not shown"
            time.sleep(0.1)
    finally:
        rank.kill()
        rank.communicate()


def test_where_sglang_shows_no_metrics_nothing_is_written(tmp_path: Path) -> None:
    run_rank(tmp_path, 0, 1, "off")
    assert not list(tmp_path.iterdir())
