# SPDX-License-Identifier: Apache-2.0
"""dashboards/kv-transport.json, for Grafana over `sage-kvt exporter`: python -m scripts.grafana_dashboard

The panels are those of the card; what only an engine knows (single transfers, reasons, digests) is on the card alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sage_kv_connector.telemetry.recording.metrics import PREFIX
from scripts.dashboard_panels import ROWS, Panel, Query

DASHBOARD = Path(__file__).resolve().parent.parent / "dashboards" / "kv-transport.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: What every series is chosen by.
ENGINE = 'engine=~"$engine"'
WIDTH = 24
HIDE_TIME = [{"id": "organize", "options": {"excludeByName": {"Time": True}}}]


def expression(query: Query) -> str:
    """PromQL with the names and the choice of engines filled in."""
    text = query.expression
    while "<<" in text:
        before, _, rest = text.partition("<<")
        name, _, after = rest.partition(">>")
        metric, _, selector = name.partition(", ")
        chosen = ", ".join(filter(None, (ENGINE, selector)))
        text = f"{before}{PREFIX}{metric}{{{chosen}}}{after}"
    return text


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        custom = {"fillOpacity": 25 if panel.stacked else 8, "stacking": stacking}
    targets = [
        {
            "refId": chr(ord("A") + at),
            "datasource": SOURCE,
            "expr": expression(query),
            "legendFormat": query.legend or "__auto",
            "instant": panel.instant,
            "range": not panel.instant,
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for at, query in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": panel.options,
        "targets": targets,
        **({"transformations": HIDE_TIME} if panel.kind == "table" else {}),
    }


def _panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS.items():
        grid = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": title,
                "gridPos": grid,
                "collapsed": False,
                "panels": [],
            }
        )
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > WIDTH:
                x, y = 0, y + panel.height
            found.append(_panel(panel, len(found) + 1, x, y))
            x += panel.width
        y += panels[-1].height
    return found


def dashboard() -> dict[str, Any]:
    """As Grafana reads it from a file; 11 and newer."""
    variables = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "engine",
            "label": "Engine",
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": f"label_values({PREFIX}sessions, engine)", "refId": "engine"},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]
    return {
        "uid": "sage-kvt-kv-transport",
        "title": "KV Transport",
        "tags": ["sage_kvt", "kv-cache"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables},
        "annotations": {"list": []},
        "panels": _panels(),
    }


def document() -> str:
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(document())
