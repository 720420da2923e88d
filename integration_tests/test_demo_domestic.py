# SPDX-License-Identifier: Apache-2.0
"""The demo between emulated accelerators: every ordered pair of vendors, two processes each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo_domestic import VENDORS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("wire", "share"),
    [
        ("fp8_e4m3", 0.6),
        pytest.param("int4", 0.3, marks=pytest.mark.full),
        pytest.param("bf16", 1, marks=pytest.mark.full),
    ],
)
def test_every_pair_of_vendors_moves_kv_bit_by_bit(wire: str, share: float) -> None:
    command = [sys.executable, "-m", "scripts.demo_domestic", "--all-pairs", "--gib", "0.03", "--json"]
    command += ["--target-dtype", "auto" if wire == "bf16" else wire]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    pairs = json.loads(done.stdout)["pairs"]
    assert len({(pair["from"], pair["to"]) for pair in pairs}) == len(VENDORS) ** 2
    for pair in pairs:
        assert pair["bit_identical"] is True and pair["emulated"] is True
        assert "emulated" in pair["from"] and "emulated" in pair["to"]
        assert pair["plan"]["wire_dtype"] == wire and pair["wire_bytes"] <= share * pair["kv_bytes"]
