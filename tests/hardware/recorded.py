# SPDX-License-Identifier: Apache-2.0
"""Recorded machines for tests."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import yaml

from sage_kv_connector.hardware.probing.profile import HardwareProfile
from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.report.topology import probe

RECORDINGS = Path(__file__).parent / "recordings"
NAMES = sorted(path.parent.name for path in RECORDINGS.glob("*/machine.yaml"))


@cache
def profile_of(name: str) -> HardwareProfile:
    """What the probe makes of a recording. Don't change it: tests share it."""
    return probe(RecordedMachine(RECORDINGS / name))


def output_of(name: str, *argv: str) -> str:
    """A tool's output in a recording."""
    return RecordedMachine(RECORDINGS / name).run(argv).output


def copied(name: str, to: Path) -> Path:
    """A recording that a test may spoil."""
    target = to / name
    shutil.copytree(RECORDINGS / name, target)
    return target


def file_of_call(recording: Path, *argv: str) -> Path:
    """Where a recording keeps the output of a call."""
    manifest = yaml.safe_load((recording / "machine.yaml").read_text())
    found: str = next(call["output"] for call in manifest["calls"] if call["argv"] == list(argv))
    return recording / found
