# SPDX-License-Identifier: Apache-2.0
"""One run of the probe: find out, measure, recommend, record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sage_kv_connector.backends import BACKENDS, lacks
from sage_kv_connector.hardware.probing.machine import TOOL_SECONDS, Machine, WithoutTools
from sage_kv_connector.hardware.probing.profile import HardwareProfile
from sage_kv_connector.hardware.probing.recording import RecordedMachine, RecordingMachine
from sage_kv_connector.hardware.report.measure import measure
from sage_kv_connector.hardware.report.recommend import recommend
from sage_kv_connector.hardware.report.topology import live_machine, probe


def run_probe(
    *,
    from_recording: Path | None = None,
    record: Path | None = None,
    about: str = "",
    measured: bool = False,
    without: Iterable[str] = (),
    tool_seconds: float = TOOL_SECONDS,
) -> HardwareProfile:
    """The profile of this machine or of a recording, with the recommendation.

    Raises ToolFormatError for a tool's output that can't be read, RecordingError for a bad recording,
    and ValueError for options that exclude each other.
    """
    if from_recording is not None and (measured or record is not None):
        raise ValueError(
            "--from-recording can be neither measured nor recorded: both need the machine itself"
        )
    machine: Machine = RecordedMachine(from_recording) if from_recording else live_machine(tool_seconds)
    recorder = RecordingMachine(machine) if record is not None else None
    try:
        profile = probe(WithoutTools(recorder or machine, list(without)))
    finally:
        # An output that can't be read is just what we want to be sent.
        if recorder is not None and record is not None:
            recorder.save(record, about)
    if measured:
        measure(profile)
    lacking = {} if from_recording else {name: why for name in BACKENDS if (why := lacks(name))}
    profile.recommendation = recommend(profile, lacking=lacking)
    return profile
