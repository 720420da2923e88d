# SPDX-License-Identifier: Apache-2.0
"""What a link is: its kind, and the bandwidth, hops and packets that tables and sysfs give it."""

from __future__ import annotations

import re

from sage_kv_connector.hardware.probing.accelerator_descriptor import AnyLinkKind, Fact, LinkFacts, LinkKind
from sage_kv_connector.hardware.probing.findings import FoundLink, kind_of_word
from sage_kv_connector.hardware.probing.profile import (
    Device,
    HardwareProfile,
    Interface,
    Link,
    Note,
    RdmaDevice,
)
from sage_kv_connector.hardware.probing.sysfs import pcie_bytes_per_s
from sage_kv_connector.hardware.report.descriptors import private_links


def device_link(profile: HardwareProfile, found: FoundLink, devices: dict[int, Device]) -> Link:
    """What a cell of a topology table says, with the chip's table values."""
    a = devices[found.a] if isinstance(found.a, int) else None
    b = devices[found.b] if isinstance(found.b, int) else None
    chip = a.descriptor if a else None
    facts = chip.link_of_cell(found.word) if chip else None
    kind = facts.kind if facts else _kind(found.word)
    ends = [one.id if one else str(end) for one, end in ((a, found.a), (b, found.b))]
    if kind is LinkKind.unknown:
        text = f"{found.source} calls the link {ends[0]}–{ends[1]} {found.word}, a word we don't know"
        profile.notes.append(Note(about=ends[0], text=text))
    return Link(
        a=ends[0],
        b=ends[1],
        kind=kind,
        path=found.word,
        bytes_per_s=_bandwidth(facts, found.word) if facts else None,
        latency_us=facts.latency_us if facts else None,
        hops=found.hops or (facts.hops if facts and kind is not LinkKind.pcie else None),
        max_packet_bytes=facts.max_packet_bytes if facts else None,
        source=found.source,
    )


def _kind(word: str) -> AnyLinkKind:
    """Links of chips that are in no table, by words that mean one thing with every vendor."""
    known = private_links()
    return known.get(word) or known.get(word.rstrip("0123456789") + "#") or kind_of_word(word)


def _bandwidth(facts: LinkFacts, word: str) -> Fact[float] | None:
    """Of one pair. All links of a device serve one pair only through a switch."""
    counted = re.fullmatch(r"[A-Z]+(\d+)", word)
    if facts.lane_bytes_per_s is not None and counted is not None:
        lanes = int(counted.group(1))
        lane = facts.lane_bytes_per_s
        return Fact[float](value=lane.value * lanes, source=f"{lanes} × {lane.value:.3g} B/s ({lane.source})")
    if facts.pair_bytes_per_s is not None:
        return facts.pair_bytes_per_s
    switched = facts.hops is not None and facts.hops.value >= 2
    # Across root complexes and sockets PCIe gives less than the device's link, nobody says how much.
    switched = switched or (facts.kind is LinkKind.pcie and word in ("PIX", "PXB", "PIB", "MUL"))
    return facts.device_bytes_per_s if switched else None


def host_link(profile: HardwareProfile, device: Device) -> Link | None:
    """The PCIe link to the host: the table's bandwidth; sysfs only where no table has one, and a note."""
    facts = device.descriptor.link(LinkKind.pcie) if device.descriptor else None
    table = facts.device_bytes_per_s if facts else None
    pci = device.pci
    shown: float | None = None
    told = ""
    if pci is not None:
        # A card at rest lowers its link, so the most it can do stands for it.
        speed, width = pci.max_speed_gt_s or pci.speed_gt_s, pci.max_width or pci.width
        if speed is not None and width is not None:
            shown, told = pcie_bytes_per_s(speed, width), f"{speed:g} GT/s x{width}"
    if table is None and shown is None:
        return None
    value = table
    if shown is not None and table is None:
        value = Fact[float](value=shown, source=f"sysfs max_link_speed and _width: {told}; no table has it")
        if shown < 2e9:
            text = f"sysfs says {told}, which some switches report wrongly: measure it"
            profile.notes.append(Note(about=device.id, text=text))
    elif shown is not None and table is not None and abs(shown - table.value) > 0.3 * table.value:
        text = (
            f"sysfs says PCIe {told} ({shown / 1e9:.1f} GB/s), the table {table.value / 1e9:.1f} GB/s "
            f"({table.source}): the table is taken, `--measure` tells"
        )
        profile.notes.append(Note(about=device.id, text=text))
    return Link(
        a=device.id,
        b="host",
        kind=LinkKind.pcie,
        path=told,
        bytes_per_s=value,
        latency_us=facts.latency_us if facts else None,
        hops=None,
        max_packet_bytes=facts.max_packet_bytes if facts else None,
        source="sysfs" if pci is not None else "descriptor",
    )


def network_links(rdma: list[RdmaDevice], nets: list[Interface]) -> list[Link]:
    """From the host's ports and interfaces to the network."""
    links = []
    for port in rdma:
        links.append(
            Link(
                a=port.name,
                b="network",
                kind=LinkKind(port.layer),
                path=f"port {port.port}",
                bytes_per_s=port.bytes_per_s,
                max_packet_bytes=port.max_packet_bytes,
                up=port.active,
                source="sysfs",
            )
        )
    for net in nets:
        packet = None if net.mtu is None else Fact[int](value=net.mtu, source="sysfs mtu")
        links.append(
            Link(
                a=net.name,
                b="network",
                kind=LinkKind.tcp,
                bytes_per_s=net.bytes_per_s,
                max_packet_bytes=packet,
                up=net.up,
                source="sysfs",
            )
        )
    return links
