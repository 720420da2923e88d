# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench telemetry``: every row is there, and what was moved is right."""

from __future__ import annotations

import json

from typer.testing import CliRunner

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
