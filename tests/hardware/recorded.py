# SPDX-License-Identifier: Apache-2.0
"""Recorded machines for tests."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import yaml

from sage_kv_connector.hardware.probing.profile import HardwareProfile, Link
from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.report.topology import probe

RECORDINGS = Path(__file__).parent / "recordings"
NAMES = sorted(path.parent.name for path in RECORDINGS.glob("*/machine.yaml"))


def recordings_of(vendor: str) -> list[str]:
    """A vendor's recordings: their names begin with its own."""
    return [name for name in NAMES if name.startswith(vendor)]


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


def link(profile: HardwareProfile, a: str, b: str) -> Link:
    return next(one for one in profile.links if {one.a, one.b} == {a, b})


def nodes(profile: HardwareProfile) -> list[int | None]:
    return [device.numa_node.value if device.numa_node else None for device in profile.devices]


def speed(one: Link) -> float | None:
    return one.bytes_per_s.value if one.bytes_per_s else None


def notes(profile: HardwareProfile) -> str:
    return "\n".join(f"{note.about}: {note.text}" for note in profile.notes)
