# SPDX-License-Identifier: Apache-2.0
"""Cambricon: ``cnmon``, ``cnmon topo -m`` and ``/proc/driver/cambricon/mlus``.

The table's format is from public outputs of cnmon 4.20 (no bus ids), 5.10.13 ("SR-IOV") and
5.10.22 ("Mode"). Of the topology matrix only descriptions were public. Never run on a card.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact
from sage_kv_connector.hardware.probing.findings import (
    MIB,
    Asker,
    Findings,
    FoundDevice,
    by_address,
)
from sage_kv_connector.hardware.probing.machine import Machine
from sage_kv_connector.hardware.probing.sysfs import PciFunction
from sage_kv_connector.hardware.probing.tool_output import (
    ToolFormatError,
    bordered,
    must_be_closed,
    pci_address,
    plain_lines,
    whole_number,
)

TABLE, TOPOLOGY = ("cnmon",), ("cnmon", "topo", "-m")


@dataclass
class Card:
    """Two rows of the table."""

    index: int
    name: str
    address: str | None = None
    memory_mib: int | None = None


def parse_table(output: str) -> list[Card]:
    """The cards of ``cnmon``. Raises ToolFormatError.

    A card has two rows under two header rows; bus id and memory are found by the header's
    column, so columns that come and go do no harm.
    """
    command = " ".join(TABLE)
    cards: list[Card] = []
    bus_column: int | None = None
    memory_column: int | None = None
    opened = False
    last = (0, "")
    for number, line in plain_lines(output):
        cells = bordered(line)
        if cells is None:
            continue
        words = cells[0].split()
        if words[:1] == ["Processes:"]:
            break
        last = (number, line)
        if words[:2] == ["Card", "VF"]:
            bus_column = next((at for at, cell in enumerate(cells) if "Bus-Id" in cell.split()), None)
            continue
        if words[:1] == ["Fan"]:
            memory_column = next(
                (at for at, cell in enumerate(cells) if "Memory-Usage" in cell.split()), None
            )
            continue
        if words[:1] == ["CNMON"] or len(cells) < 3:
            continue
        if memory_column is None:
            raise ToolFormatError(
                command, number, line, "the headers 'Card VF Name …' and 'Fan … Memory-Usage'"
            )
        if not opened:
            if len(words) < 3:
                raise ToolFormatError(command, number, line, "card, VF and name")
            index = whole_number(command, number, line, words[0], "the card")
            card = Card(index, words[2])
            if bus_column is not None:
                card.address = pci_address(cells[bus_column].split()[-1] if cells[bus_column] else "")
                if card.address is None:
                    raise ToolFormatError(command, number, line, "a PCI address under Bus-Id")
            cards.append(card)
        else:
            usage = re.search(r"/\s*(\d+)\s*MiB", cells[memory_column], re.ASCII)
            if usage is None:
                raise ToolFormatError(command, number, line, "'… MiB/ … MiB' under Memory-Usage")
            cards[-1].memory_mib = int(usage.group(1))
        opened = not opened
    if not cards or opened:
        raise ToolFormatError(command, *last, "two rows a card")
    must_be_closed(command, output, last)
    return cards


def probe(machine: Machine, functions: list[PciFunction]) -> Findings:
    """Devices and links of this vendor. Raises ToolFormatError."""
    found = Findings()
    nodes = [name for name in machine.names("/dev") if re.fullmatch(r"cambricon_dev\d+", name)]
    addresses = machine.names("/proc/driver/cambricon/mlus")
    asker = Asker(machine, found, expected=bool(functions or nodes or addresses))
    table = asker.ask(*TABLE)
    if table is None:
        found.devices = by_address(functions)
        if not found.devices:
            known = [address for text in addresses if (address := pci_address(text)) is not None]
            found.devices = [FoundDevice(index, pci_address=address) for index, address in enumerate(known)]
        return found
    cards = parse_table(table)
    # cnmon 4 prints no bus ids; its cards are in the order of the addresses.
    ordered = sorted(function.address for function in functions)
    for card in cards:
        address = card.address
        if address is None and len(ordered) == len(cards):
            address = ordered[card.index]
            found.note("cnmon", "prints no bus ids: cards are taken in the order of PCI addresses")
        found.devices.append(
            FoundDevice(
                index=card.index,
                name=card.name,
                pci_address=address,
                memory_bytes=None
                if card.memory_mib is None
                else Fact[int](value=card.memory_mib * MIB, source="cnmon"),
            )
        )
    asker.ask_matrix("MLU", *TOPOLOGY)
    return found
