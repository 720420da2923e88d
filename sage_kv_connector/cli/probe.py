# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt probe``: find out, measure, recommend, record, and show it to people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.console import bytes_text
from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact
from sage_kv_connector.hardware.probing.machine import TOOL_SECONDS, LiveMachine, Machine, WithoutTools
from sage_kv_connector.hardware.probing.profile import HardwareProfile, Link, Measurement
from sage_kv_connector.hardware.probing.recording import RecordedMachine, RecordingMachine
from sage_kv_connector.hardware.report.measure import measure
from sage_kv_connector.hardware.report.recommend import recommend
from sage_kv_connector.hardware.report.topology import probe


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
    machine: Machine = RecordedMachine(from_recording) if from_recording else LiveMachine(tool_seconds)
    recorder = RecordingMachine(machine) if record is not None else None
    try:
        profile = probe(WithoutTools(recorder or machine, list(without)))
    finally:
        # An output that can't be read is just what we want to be sent.
        if recorder is not None and record is not None:
            recorder.save(record, about)
    if measured:
        measure(profile)
    profile.recommendation = recommend(profile)
    return profile


def write_config(profile: HardwareProfile, path: Path) -> None:
    """The recommended options as ``kv_transport.yaml``, or into a ``config.yaml``. Raises ValueError."""
    assert profile.recommendation is not None
    KVTransportConfig.load(profile.recommendation.config).to_file(path)


def probe_rows(profile: HardwareProfile) -> list[tuple[str, str]]:
    """The profile for people."""
    host = profile.platform
    nodes = f"{len(host.numa_nodes)} NUMA node{'s' if len(host.numa_nodes) != 1 else ''}"
    rows = [("host", f"{host.kernel}{' (WSL2)' if host.wsl2 else ''}, {host.cpus} CPUs, {nodes}")]
    for device in profile.devices:
        node = f", NUMA node {device.numa_node.value}" if device.numa_node else ""
        memory = f", {bytes_text(device.memory_bytes.value)}" if device.memory_bytes else ""
        chip = f" [{device.chip}]" if device.chip and device.chip != device.name else ""
        name = device.name or device.pci_device or "unnamed"
        rows.append((device.id, f"{name}{chip}{memory}, {device.pci_address or 'no PCI address'}{node}"))
    rows += _link_rows(profile.links)
    rows += [(f"{one.name} {one.subject}", f"{_value(one)} ({one.how})") for one in profile.measurements]
    rows += [(f"note: {_few(note.about.split(', '))}", note.text) for note in profile.notes]
    if (choice := profile.recommendation) is not None:
        options = " ".join(f"{key}={value}" for key, value in choice.config.items())
        rows.append(("recommended", options))
        rows += [("", reason) for reason in choice.reasons]
    return rows


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _link_rows(links: list[Link]) -> list[tuple[str, str]]:
    """Links that are alike on one line."""
    alike: dict[tuple[str, str, str], list[Link]] = {}
    for link in links:
        speed = _speed(link.bytes_per_s)
        end = link.b if link.b in ("host", "network") else "devices"
        state = "" if link.up is None else " up" if link.up else " down"
        path = link.path if end == "devices" and link.path.lower() != link.kind else ""
        alike.setdefault((f"{link.kind} {path}".strip(), end, f"{speed}{state}"), []).append(link)
    rows = []
    for (name, end, speed), same in alike.items():
        ends = Counter(link.a for link in same)
        who = ", ".join(f"{link.a}–{link.b}" for link in same[:3]) if end == "devices" else ", ".join(ends)
        more = f" and {len(same) - 3} more" if end == "devices" and len(same) > 3 else ""
        rows.append((name, f"{who}{more}{'' if end == 'devices' else f' to {end}'}: {speed}"))
    return rows


def _speed(fact: Fact[float] | None) -> str:
    if fact is None:
        return "bandwidth not known"
    before = f", table {fact.table_value / 1e9:.1f}" if fact.table_value is not None else ""
    return f"{fact.value / 1e9:.1f} GB/s{' measured' if fact.measured else ''}{before}"


def _value(one: Measurement) -> str:
    return f"{one.value / 1e9:.2f} GB/s" if one.unit == "bytes/s" else f"{one.value:.1f} µs"
