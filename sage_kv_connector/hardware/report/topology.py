# SPDX-License-Identifier: Apache-2.0
"""``probe``: everything a machine has for moving KV, put together from the kernel and the vendors' tools."""

from __future__ import annotations

from typing import Protocol

from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact, LinkKind, VendorDescriptors
from sage_kv_connector.hardware.probing.findings import Findings, FoundDevice
from sage_kv_connector.hardware.probing.machine import TOOL_SECONDS, LiveMachine, Machine
from sage_kv_connector.hardware.probing.profile import (
    Device,
    HardwareProfile,
    Link,
    Note,
)
from sage_kv_connector.hardware.probing.recording import RecordingError
from sage_kv_connector.hardware.probing.sysfs import (
    PciFunction,
    interfaces,
    node_of_cpus,
    pci_functions,
    platform,
    rdma_devices,
)
from sage_kv_connector.hardware.probing.tool_output import ToolFormatError
from sage_kv_connector.hardware.report.descriptors import all_descriptors, find_descriptor, known_descriptors
from sage_kv_connector.hardware.report.links import device_link, host_link, network_links
from sage_kv_connector.vendors import BrokenVendor, third_party, vendor_module


class VendorProbe(Protocol):
    """What ``vendors/<vendor>/probe.py`` has."""

    def __call__(self, machine: Machine, functions: list[PciFunction]) -> Findings: ...


def probe(machine: Machine | None = None) -> HardwareProfile:
    """Find devices, links and networks; the recommendation is ``recommend.recommend``'s part.

    A tool that is missing, hangs or fails is a note. Raises ToolFormatError for an output that
    can't be read, with the line, and RecordingError for a recording that is not whole.
    """
    machine = machine if machine is not None else live_machine()
    host = platform(machine)
    functions = pci_functions(machine)
    profile = HardwareProfile(
        origin=machine.origin,
        platform=host,
        devices=[],
        links=[],
        rdma=rdma_devices(machine),
        interfaces=interfaces(machine),
        notes=[],
    )
    for vendor, table in known_descriptors():
        try:
            if isinstance(table, BrokenVendor):
                raise table
            of_vendor = [one for one in functions if one.vendor == table.pci_vendor]
            own = [one for one in of_vendor if one.pci_class.startswith(tuple(table.pci_classes))]
            found = _found(vendor, machine, own)
        except BrokenVendor as error:
            profile.notes.append(Note(about=vendor, text=str(error)))
            continue
        # A device that its tool shows may have any class; the filter is for counting without a tool.
        _add(profile, table, found, of_vendor, machine)
    profile.links += network_links(profile.rdma, profile.interfaces)
    profile.notes = _grouped(profile.notes)
    return profile


def live_machine(tool_seconds: float = TOOL_SECONDS) -> LiveMachine:
    """This machine, with the places where vendors install their tools."""
    places = [place for table in all_descriptors() for place in table.tool_directories]
    return LiveMachine(tool_seconds, places)


def _found(vendor: str, machine: Machine, functions: list[PciFunction]) -> Findings:
    run: VendorProbe = vendor_module(vendor, "probe").probe
    with third_party(vendor, "its probe", (ToolFormatError, RecordingError)):
        return run(machine, functions)


def _grouped(notes: list[Note]) -> list[Note]:
    """One note for all devices that it is about."""
    about: dict[str, list[str]] = {}
    for note in notes:
        about.setdefault(note.text, []).append(note.about)
    return [Note(about=", ".join(dict.fromkeys(names)), text=text) for text, names in about.items()]


def _add(
    profile: HardwareProfile,
    table: VendorDescriptors,
    found: Findings,
    functions: list[PciFunction],
    machine: Machine,
) -> None:
    profile.notes += found.notes
    by_address = {function.address: function for function in functions}
    devices = [
        _device(profile, table, one, by_address.get(one.pci_address or ""), machine) for one in found.devices
    ]
    profile.devices += devices
    addresses = {device.pci_address for device in devices}
    _check_sysfs_nodes(profile, table, [one for one in functions if one.address in addresses])
    by_index = {device.index: device for device in devices}
    for link in found.links:
        profile.links.append(device_link(profile, link, by_index))
    for device in devices:
        if (host := host_link(profile, device)) is not None:
            profile.links.append(host)
    for port in found.ports:
        owner = by_index[port.index]
        facts = owner.descriptor.link(LinkKind.roce) if owner.descriptor else None
        known = facts.device_bytes_per_s if facts else None
        profile.links.append(
            Link(
                a=owner.id,
                b="network",
                kind=LinkKind.roce,
                path=port.address or "",
                bytes_per_s=port.bytes_per_s or known,
                max_packet_bytes=facts.max_packet_bytes if facts else None,
                up=port.up,
                source=port.source,
            )
        )


def _device(
    profile: HardwareProfile,
    table: VendorDescriptors,
    found: FoundDevice,
    function: PciFunction | None,
    machine: Machine,
) -> Device:
    chip = find_descriptor(table.vendor, function.device if function else None, found.name)
    name = f"{table.vendor}{found.index}"
    if chip is None:
        told = f"{found.name or 'a device'} ({function.vendor}:{function.device})" if function else found.name
        profile.notes.append(Note(about=name, text=f"{told} is in no table: only what was found is shown"))
    if found.pci_address is not None and function is None:
        profile.notes.append(
            Note(
                about=name,
                text=f"{found.pci_address} is not in sysfs here (a container or a virtual machine)",
            )
        )
    return Device(
        id=name,
        vendor=table.vendor,
        index=found.index,
        name=found.name,
        chip=chip.chip if chip else None,
        pci_address=found.pci_address,
        pci_device=f"{function.vendor}:{function.device}" if function else None,
        pci=function.link if function else None,
        node=_node(table, found.index if found.node is None else found.node, machine),
        numa_node=_numa(profile, name, found, function),
        memory_bytes=found.memory_bytes or (chip.memory_bytes if chip else None),
        descriptor=chip,
    )


def _node(table: VendorDescriptors, index: int, machine: Machine) -> str | None:
    """The device node, where the vendor numbers nodes as devices."""
    directory, _, pattern = table.nodes.rpartition("/")
    name = pattern.replace("*", str(index + 128 if pattern.startswith("renderD") else index))
    return f"{directory}/{name}" if name in machine.names(directory) else None


def _numa(
    profile: HardwareProfile, name: str, found: FoundDevice, function: PciFunction | None
) -> Fact[int] | None:
    """The vendor's tool before CPU affinity before sysfs, which says -1 or 0 behind some switches."""
    nodes = profile.platform.numa_nodes
    answers: list[Fact[int]] = []
    if found.numa_node is not None:
        answers.append(found.numa_node)
    if found.cpus is not None:
        node = node_of_cpus(found.cpus.value, nodes)
        if node is not None:
            answers.append(
                Fact[int](value=node, source=f"{found.cpus.source}: CPU affinity {found.cpus.value}")
            )
        elif nodes:
            profile.notes.append(
                Note(about=name, text=f"CPU affinity {found.cpus.value} is not inside one NUMA node")
            )
    if function is not None and function.numa_node is not None:
        answers.append(Fact[int](value=function.numa_node, source="sysfs numa_node"))
    if not answers:
        return None
    best = answers[0]
    for other in answers[1:]:
        if other.value != best.value:
            text = f"NUMA node {best.value} by {best.source}, but {other.value} by {other.source}"
            profile.notes.append(Note(about=name, text=f"{text}: the first is taken"))
    return best


def _check_sysfs_nodes(
    profile: HardwareProfile, table: VendorDescriptors, functions: list[PciFunction]
) -> None:
    if len(profile.platform.numa_nodes) < 2 or not functions:
        return
    nodes = {function.numa_node for function in functions}
    if nodes == {None}:
        profile.notes.append(Note(about=table.vendor, text="sysfs numa_node is -1 for every device"))
    elif nodes == {0} and len(functions) > 1:
        text = "sysfs numa_node is 0 for every device on a host with several nodes: likely wrong"
        profile.notes.append(Note(about=table.vendor, text=text))
