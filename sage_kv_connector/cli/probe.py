# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt probe``: devices, links and networks of this machine, shown to people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from sage_kv_connector.cli.options import AsJson
from sage_kv_connector.console import bytes_text, emit, progress
from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact
from sage_kv_connector.hardware.probing.profile import HardwareProfile, Link, Measurement


def probe(
    measured: Annotated[
        bool, typer.Option("--measure", help="time memory, loopback, devices and RDMA ports; some seconds")
    ] = False,
    from_recording: Annotated[
        Path | None, typer.Option(help="a directory that --record made, instead of this machine")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="write all that was read here to this directory, to send it in")
    ] = None,
    about: Annotated[str, typer.Option(help="a line about this machine for --record")] = "",
    without: Annotated[
        list[str] | None, typer.Option(help="treat a tool as missing, such as npu-smi; may be repeated")
    ] = None,
    tool_seconds: Annotated[float, typer.Option(min=0.1, help="time limit of one call of a tool")] = 10.0,
    write: Annotated[
        Path | None, typer.Option(help="write the recommended options: kv_transport.yaml or a config.yaml")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Devices, links and networks of this machine, and the options they call for.

    Exit status 1 if a tool's output or a recording can't be read.
    """
    from sage_kv_connector.config import KVTransportConfig
    from sage_kv_connector.hardware.report.run import run_probe

    try:
        profile = run_probe(
            from_recording=from_recording,
            record=record,
            about=about,
            measured=measured,
            without=without or (),
            tool_seconds=tool_seconds,
        )
        if write is not None:
            assert profile.recommendation is not None
            KVTransportConfig.load(profile.recommendation.config).to_file(write)
    except ValueError as error:
        # Tools print what they like; their words are no markup.
        progress.print(f"probe: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    emit(profile.model_dump(mode="json"), as_json=as_json, title="hardware", rows=_rows(profile))


def _rows(profile: HardwareProfile) -> list[tuple[str, str]]:
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
