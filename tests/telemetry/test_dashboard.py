# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard asks for metrics and labels that there are. What Prometheus and Grafana's own models say of it:
integration_tests/test_dashboard.py."""

from __future__ import annotations

import json
import re

import pytest

from sage_kv_connector.telemetry.recording.metrics import METRICS, PREFIX, Kind
from scripts.grafana_dashboard import DASHBOARD, document

PANELS = json.loads(document())["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]
#: What a histogram has beside what it is named.
PARTS = {"_bucket": {"le"}, "_sum": set(), "_count": set()}


def labels_of(name: str) -> set[str]:
    """Of a series by its name in Prometheus. Raises KeyError for one that there is not."""
    for ending, more in PARTS.items():
        metric = METRICS.get(name.removesuffix(ending))
        if name.endswith(ending) and metric is not None and metric.kind is Kind.HISTOGRAM:
            return {"engine", "rank", *metric.labels, *more}
    if METRICS[name].kind is Kind.HISTOGRAM:
        raise KeyError(name)
    return {"engine", "rank", *METRICS[name].labels}


def wrong(expression: str) -> list[str]:
    """Metrics, and labels in selectors and groups, that there are not."""
    found, known = [], set()
    for name, selector in re.findall(rf"{PREFIX}(\w+)(?:\{{([^}}]*)\}})?", expression):
        try:
            labels = labels_of(name)
        except KeyError:
            found.append(name)
            continue
        known |= labels
        found += sorted(set(re.findall(r"(\w+)\s*[=!]", selector)) - labels)
    for group in re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", expression):
        found += sorted(set(group.replace(" ", "").split(",")) - known)
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_panel_asks_for_metrics_and_labels_that_there_are(expression: str) -> None:
    assert PREFIX in expression and wrong(expression) == []


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("sum(sage_kvt_link_byte_total)", ["link_byte_total"]),
        ("sum(sage_kvt_stage_seconds)", ["stage_seconds"]),
        ('sage_kvt_link_bytes_total{pear="x"}', ["pear"]),
        ("sum by (engine, cod) (sage_kvt_transfers_total)", ["cod"]),
        ("sum by (le) (sage_kvt_stage_seconds_sum)", ["le"]),
    ],
)
def test_what_is_not_there_is_found(expression: str, what: list[str]) -> None:
    assert wrong(expression) == what


def test_legends_name_labels_that_the_series_keep() -> None:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            groups = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            kept = {label for group in groups for label in group.replace(" ", "").split(",")}
            assert named <= kept, (panel["title"], target["legendFormat"])


def test_the_file_is_what_its_script_writes() -> None:
    assert DASHBOARD.read_text() == document(), "run python -m scripts.grafana_dashboard"


def test_panels_have_ids_of_their_own_and_lie_side_by_side() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) > 15
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
