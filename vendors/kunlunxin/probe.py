# SPDX-License-Identifier: Apache-2.0
"""Kunlunxin: ``xpu-smi`` and ``xpu-smi topo -m``.

The table's format is from a public output of a P800 OAM host (driver 515.58). Of the topology
matrix only a parser and a report were public: labels XPU#, cells XL and nvidia-smi's words,
NICs as NIC# with a legend or by their names. Never run on a card.
"""

from __future__ import annotations

import re

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
    PCI_ADDRESS,
    ToolFormatError,
    bordered,
    must_be_closed,
    pci_address,
    plain_lines,
    whole_number,
)

TABLE, TOPOLOGY = ("xpu-smi",), ("xpu-smi", "topo", "-m")


def parse_table(output: str) -> list[FoundDevice]:
    """The devices of ``xpu-smi``. Raises ToolFormatError.

    A device has a row with name and bus id, one with the memory, and on newer drivers one with the L3.
    """
    command = " ".join(TABLE)
    devices: list[FoundDevice] = []
    last = (0, "")
    body = False
    for number, line in plain_lines(output):
        if line.strip().startswith("|===="):
            body = True
            continue
        cells = bordered(line)
        if cells is None:
            continue
        if cells[0].startswith("Processes"):
            break
        last = (number, line)
        if not body:
            continue
        if len(cells) < 3:
            raise ToolFormatError(command, number, line, "three columns")
        words = cells[0].split()
        address = PCI_ADDRESS.search(cells[1])
        if address is not None:
            if len(words) < 2:
                raise ToolFormatError(command, number, line, "the device's number and name")
            index = whole_number(command, number, line, words[0], "the device")
            # The last word of the first cell is the state of Persistence-M.
            name = " ".join(words[1:-1]) if len(words) > 2 else words[1]
            devices.append(FoundDevice(index, name, pci_address(address.group(0))))
            continue
        if words[:1] and words[0].isdigit():
            raise ToolFormatError(command, number, line, "a PCI address under Bus-Id")
        usage = re.search(r"/\s*(\d+)\s*MiB", cells[1], re.ASCII)
        if usage is None or not devices:
            raise ToolFormatError(command, number, line, "a device's row, or '…MiB / …MiB' below one")
        if devices[-1].memory_bytes is None:  # the second usage is the L3's
            devices[-1].memory_bytes = Fact[int](value=int(usage.group(1)) * MIB, source=command)
    if not devices or devices[-1].memory_bytes is None:
        raise ToolFormatError(command, *last, "a row of a device and one of its memory")
    must_be_closed(command, output, last)
    return devices


def probe(machine: Machine, functions: list[PciFunction]) -> Findings:
    """Devices and links of this vendor. Raises ToolFormatError."""
    found = Findings()
    nodes = [name for name in machine.names("/dev") if re.fullmatch(r"xpu\d+", name)]
    asker = Asker(machine, found, expected=bool(functions or nodes))
    if not asker.expected:
        # Intel's tool has the same name and other tables; without a device of this vendor it is not ours.
        return found
    table = asker.ask(*TABLE)
    if table is None:
        found.devices = by_address(functions)
        return found
    found.devices = parse_table(table)
    asker.ask_matrix("XPU", *TOPOLOGY)
    return found
