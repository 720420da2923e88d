# SPDX-License-Identifier: Apache-2.0
"""What a vendor's probe hands to ``topology.probe``, and how it asks a tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact, LinkKind
from sage_kv_connector.hardware.probing.machine import Machine, ToolState
from sage_kv_connector.hardware.probing.profile import Note
from sage_kv_connector.hardware.probing.sysfs import PciFunction
from sage_kv_connector.hardware.probing.tool_output import Matrix, parse_matrix

MIB = 1 << 20


@dataclass
class FoundDevice:
    """A device as its vendor's tools show it."""

    index: int
    name: str = ""
    pci_address: str | None = None
    memory_bytes: Fact[int] | None = None
    numa_node: Fact[int] | None = None
    cpus: Fact[str] | None = None  #: CPU affinity as the tool prints it
    node: int | None = None  #: number of the device node, where it is not the index


@dataclass
class FoundLink:
    """A cell of a topology table; ends are device indices or names of network devices."""

    a: int | str
    b: int | str
    word: str
    source: str
    hops: Fact[int] | None = None


@dataclass
class FoundPort:
    """A network port of a device's own (Ascend)."""

    index: int
    up: bool | None
    bytes_per_s: Fact[float] | None
    address: str | None
    source: str


@dataclass
class Findings:
    """Everything of one vendor."""

    devices: list[FoundDevice] = field(default_factory=list)
    links: list[FoundLink] = field(default_factory=list)
    ports: list[FoundPort] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def note(self, about: str, text: str) -> None:
        self.notes.append(Note(about=about, text=text))


@dataclass
class Asker:
    """Runs one vendor's tools; what does not answer becomes a note, once a tool."""

    machine: Machine
    findings: Findings
    expected: bool  #: devices are here, so a missing tool is worth a note
    _told: set[str] = field(default_factory=set)

    def ask(self, *argv: str) -> str | None:
        """The tool's stdout, or None with a note that says why there is none."""
        answer = self.machine.run(argv)
        if answer.usable:
            return answer.output
        if answer.state is ToolState.missing:
            if self.expected and argv[0] not in self._told:
                self.findings.note(argv[0], "not found here: what only it tells is missing below")
            self._told.add(argv[0])
        elif answer.state is ToolState.hung:
            self.findings.note(answer.command, "gave no answer within the time limit and was stopped")
        elif answer.status != 0:
            # Some vendors' tools print their errors on stdout.
            said = (answer.errors or answer.output).strip().splitlines()
            self.findings.note(
                answer.command, f"exit status {answer.status}{': ' + said[0][:200] if said else ''}"
            )
        else:
            self.findings.note(answer.command, "printed nothing")
        return None

    def ask_matrix(self, prefix: str, *argv: str) -> None:
        """Links and affinities of the devices found so far, whose labels are ``prefix`` and their index ("GPU3").

        Raises ToolFormatError.
        """
        table = self.ask(*argv)
        if table is None:
            return
        command = " ".join(argv)
        matrix = parse_matrix(command, table, prefix)
        add_matrix(self.findings, matrix, command, numbered(matrix, prefix, self.findings.devices))


def by_address(functions: Sequence[PciFunction]) -> list[FoundDevice]:
    """Devices from PCI alone, when no tool answers; the order of addresses stands for the index."""
    return [
        FoundDevice(index=place, pci_address=function.address)
        for place, function in enumerate(sorted(functions, key=lambda one: one.address))
    ]


def add_matrix(
    findings: Findings,
    matrix: Matrix,
    command: str,
    devices: Mapping[str, int],
    skipped: frozenset[str] = frozenset({"X", "0", "NA", "N/A"}),
) -> None:
    """Turn a matrix into links (each pair once), CPU and NUMA affinity.

    ``devices`` maps labels to indices; every other label is a network device and goes by its
    legend's name. ``skipped`` are words for a device itself and for "not known".
    """
    known = {device.index: device for device in findings.devices}
    for place, a in enumerate(matrix.labels):
        if a not in devices:
            continue
        for b in matrix.labels[place + 1 :]:
            word = matrix.cells.get((a, b))
            if word is None or word in skipped:
                continue
            other: int | str = devices[b] if b in devices else matrix.legend.get(b, b)
            findings.links.append(FoundLink(devices[a], other, word, command))
        device = known.get(devices[a])
        for column, value in matrix.extras.get(a, {}).items():
            if device is None or value in ("N/A", "-", "NA"):
                continue
            if column == "CPU Affinity":
                device.cpus = Fact[str](value=value, source=command)
            elif column in ("NUMA Affinity", "Node Affinity") and value.isdigit():
                device.numa_node = Fact[int](value=int(value), source=command)


def numbered(matrix: Matrix, prefix: str, devices: Sequence[FoundDevice]) -> dict[str, int]:
    """Labels of devices whose number is the index ("GPU3" → 3)."""
    return {
        label: device.index
        for device in devices
        for label in (f"{prefix}{device.index}",)
        if label in matrix.labels
    }


#: What a word of nvidia-smi's legend (which the other vendors follow) says of a PCIe path.
PCIE_WORDS = frozenset({"PIX", "PXB", "PIB", "PHB", "NODE", "SYS", "PCIE", "CPU", "MUL"})


def kind_of_word(word: str) -> LinkKind:
    """The kind of a word that no descriptor lists."""
    return LinkKind.pcie if word in PCIE_WORDS else LinkKind.unknown
