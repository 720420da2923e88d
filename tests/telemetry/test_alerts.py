# SPDX-License-Identifier: Apache-2.0
"""Alert rules ask for metrics and labels that there are; promtool reads them, and what the exporter says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.reading.exporter import create_app
from sage_kv_connector.telemetry.recording.metrics import METRICS, PREFIX, Kind
from sage_kv_connector.telemetry.recording.snapshot import Snapshot
from scripts.metrics_document import DOCUMENT, document
from tests.telemetry.http_reader import reader
from tests.telemetry.test_recorder import record

RULES = Path(__file__).resolve().parents[2] / "dashboards" / "kv-transport.rules.yml"
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool (Debian's prometheus) is not here"
)
#: Of the exporter itself.
OWN = {"engines", "silent_engines"}


def expressions() -> list[str]:
    return [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("expression", expressions())
def test_a_rule_asks_for_metrics_and_labels_that_there_are(expression: str) -> None:
    asked = re.findall(rf"{PREFIX}(\w+)(?:{{([^}}]*)}})?", expression)
    assert asked
    known = {"engine", "rank", "le"}
    for name, selector in asked:
        if name in OWN:
            continue
        metric = METRICS.get(name) or METRICS[name.removesuffix("_bucket")]
        assert (metric.kind is Kind.HISTOGRAM) == name.endswith("_bucket")
        known |= set(metric.labels)
        assert set(re.findall(r"(\w+)=", selector)) <= set(metric.labels)
    for labels in re.findall(r"by \(([^)]*)\)", expression):
        assert set(labels.replace(" ", "").split(",")) <= known


@needs_promtool
def test_promtool_finds_nothing_wrong_with_rules_and_metrics() -> None:
    subprocess.run(["promtool", "check", "rules", str(RULES)], check=True, capture_output=True)
    from sage_kv_connector.telemetry.recording.recorder import Recorder

    recorder = Recorder()
    recorder.ended(record())
    recorder.ended(record(code="checksum"))
    taken = Snapshot("e", 0, 1, 0, 0, tuple(recorder.samples()), tuple(recorder.times()))
    client = reader(create_app(lambda: sources.Found([taken])))
    said = subprocess.run(
        ["promtool", "check", "metrics"], input=client.get("/metrics").text, text=True, capture_output=True
    )
    assert said.returncode == 0 and not said.stdout + said.stderr, said.stdout + said.stderr


def test_the_document_of_metrics_is_what_the_table_says() -> None:
    assert DOCUMENT.read_text() == document(), "run python -m scripts.metrics_document"
