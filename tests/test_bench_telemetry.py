# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench telemetry``: every row is there, and what was moved is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from sage_kv_connector.bench.telemetry import _overhead
from sage_kv_connector.cli.main import app


def test_telemetry_and_spans_have_their_rows() -> None:
    words = [
        "--backends",
        "tcp",
        "--blocks",
        "65536",
        "--mib",
        "1",
        "--tokens",
        "64",
        "--rounds",
        "4",
        "--json",
    ]
    done = CliRunner().invoke(app, ["bench", "telemetry", *words])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["what"] for row in rows] == ["transfer", "hand-over", "hand-over with spans"]
    assert all(row["right"] and row["with_s"] > 0 for row in rows)
    assert all(row["overhead"] > -1 and row["cpu_overhead"] > -1 for row in rows)
    assert all(low <= cost <= high for row in rows for cost, (low, high) in both_costs(row))


def both_costs(row: dict[str, Any]) -> Iterator[tuple[float, list[float]]]:
    """Of wall time and of CPU time, with their intervals."""
    yield row["overhead"], row["interval"]
    yield row["cpu_overhead"], row["cpu_interval"]


def test_a_pair_whose_memory_lies_badly_widens_the_interval() -> None:
    alike = [[1.01, 0.99, 1.0, 1.0]] * 4
    cost, (low, high) = _overhead(alike)
    assert cost == 0 and high - low < 0.02
    cost, (low, high) = _overhead([*alike[:3], [1.21, 1.19, 1.2, 1.2]])
    assert cost == pytest.approx(1.2**0.25 - 1) and low < 0.001 and high > 0.09
