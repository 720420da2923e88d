# SPDX-License-Identifier: Apache-2.0
"""``make device-check``, rehearsed on an emulated card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import device_check
from scripts.device_check import PHASES

ROOT = Path(__file__).parents[1]


def rehearsal(*words: str) -> tuple[int, list[dict[str, object]]]:
    command = [sys.executable, "scripts/device_check.py", "--emulated", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_every_phase_is_rehearsed(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    status, rows = rehearsal("--report", str(report))
    assert [row["phase"] for row in rows] == [phase.name for phase in PHASES]
    assert status == 0 and all(row["ok"] and row["emulated"] for row in rows), rows
    assert [json.loads(line) for line in report.read_text().splitlines()] == rows


def test_a_phase_that_fails_or_has_no_time_does_not_stop_the_others(tmp_path: Path) -> None:
    report = str(tmp_path / "report.jsonl")
    status, rows = rehearsal("--vendor", "no-such-vendor", "--only", "golden", "kernels", "--report", report)
    assert status == 1 and [row["ok"] for row in rows] == [False, False]
    assert "no-such-vendor" in str(rows[0]["why"])
    status, rows = rehearsal("--limit", "1", "--only", "golden", "--report", report)
    assert status == 1 and rows[0]["why"] == "no time is left of 1 s"


def test_a_phase_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object) -> dict[str, object]:
        raise subprocess.TimeoutExpired("golden", 60)

    monkeypatch.setattr(device_check, "measured", hangs)
    found = device_check.run(PHASES[1], 60, None)  # type: ignore[arg-type]
    assert found["ok"] is False and "TimeoutExpired" in found["why"]
