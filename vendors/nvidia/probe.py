# SPDX-License-Identifier: Apache-2.0
"""NVIDIA: ``nvidia-smi --query-gpu`` (CSV) and ``nvidia-smi topo -m``."""

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
    ToolFormatError,
    pci_address,
    plain_lines,
    whole_number,
)

QUERY = ("nvidia-smi", "--query-gpu=index,pci.bus_id,memory.total,name", "--format=csv,noheader,nounits")
TOPOLOGY = ("nvidia-smi", "topo", "-m")


def parse_query(output: str) -> list[FoundDevice]:
    """The devices of the query; memory is in MiB, the name comes last. Raises ToolFormatError."""
    command = " ".join(QUERY)
    devices = []
    for number, line in plain_lines(output):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split(",", 3)]
        if len(cells) < 4:
            raise ToolFormatError(command, number, line, "index, bus id, memory in MiB and name")
        address = pci_address(cells[1])
        if address is None:
            raise ToolFormatError(command, number, line, f"a PCI address, not {cells[1]!r}")
        # Devices that share the host's memory (GB10) print "[N/A]".
        memory = None
        if not cells[2].startswith("["):
            mib = whole_number(command, number, line, cells[2], "memory in MiB")
            memory = Fact[int](value=mib * MIB, source="nvidia-smi memory.total")
        index = whole_number(command, number, line, cells[0], "the index")
        devices.append(FoundDevice(index, cells[3], address, memory))
    if not devices:
        raise ToolFormatError(command, 0, "", "a line a device")
    return devices


def probe(machine: Machine, functions: list[PciFunction]) -> Findings:
    """Devices and links of this vendor. Raises ToolFormatError."""
    found = Findings()
    nodes = [name for name in machine.names("/dev") if re.fullmatch(r"nvidia\d+", name)]
    asker = Asker(machine, found, expected=bool(functions or nodes))
    query = asker.ask(*QUERY)
    if query is None:
        found.devices = by_address(functions)
        return found
    found.devices = parse_query(query)
    asker.ask_matrix("GPU", *TOPOLOGY)
    return found
