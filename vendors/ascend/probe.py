# SPDX-License-Identifier: Apache-2.0
"""Ascend: ``npu-smi info``, ``info -m``, ``info -t topo`` and ``hccn_tool``.

Formats from public outputs of 310P, 910B (A2), 910C (A3) and Ascend 950 (A5) hosts, drivers
23.0 to 25.5; never run on a card. Three ids name a chip: the card's "NPU ID", the "Chip Logic
ID" that the runtime counts by, and the "Phy-ID" of A3 and A5. Topology tables are labelled by
NPU ID on A2 and A5 and by Phy-ID on A3.
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
    FoundPort,
    add_matrix,
    by_address,
)
from sage_kv_connector.hardware.probing.machine import Machine
from sage_kv_connector.hardware.probing.sysfs import PciFunction
from sage_kv_connector.hardware.probing.tool_output import (
    ToolFormatError,
    bordered,
    must_be_closed,
    parse_matrix,
    pci_address,
    plain_lines,
    whole_number,
)

INFO, MAPPING, TOPOLOGY = ("npu-smi", "info"), ("npu-smi", "info", "-m"), ("npu-smi", "info", "-t", "topo")


@dataclass
class Chip:
    """A chip's row of ``npu-smi info``, or of the mapping."""

    npu: int
    chip: int
    name: str
    physical: int | None = None
    logic: int | None = None
    address: str | None = None
    memory_mb: int | None = None


def parse_info(output: str) -> list[Chip]:
    """The chips of ``npu-smi info``; the name is the card's. Raises ToolFormatError.

    A card's row (NPU, name | health | power …) stands before each chip's row (chip, on A3
    also Phy-ID | bus id | usages), or once before several.
    """
    command = " ".join(INFO)
    chips: list[Chip] = []
    card: tuple[int, str] | None = None
    columns: list[str] = []
    last = (0, "")
    for number, line in plain_lines(output):
        cells = bordered(line)
        if cells is None or len(cells) < 2:
            continue
        words = cells[0].split()
        if words[:1] == ["NPU"] and "Process" in line:
            break
        last = (number, line)
        if words[:1] == ["NPU"]:
            continue
        if words[:1] == ["Chip"]:
            columns = words + cells[-1].split()
            continue
        if not columns:
            raise ToolFormatError(command, number, line, "the header 'Chip … | Bus-Id | …' above it")
        address = pci_address(cells[1])
        if address is None and cells[1] not in ("NA", "N/A"):
            if len(words) < 2:
                raise ToolFormatError(command, number, line, "NPU and name in the first column")
            card = (whole_number(command, number, line, words[0], "the NPU"), " ".join(words[1:]))
            continue
        if card is None:
            raise ToolFormatError(command, number, line, "a card's row above a chip's")
        ids = [whole_number(command, number, line, word, "a chip's id") for word in words]
        if not ids:
            raise ToolFormatError(command, number, line, "the chip's id in the first column")
        chip = Chip(card[0], ids[0], card[1], address=address, memory_mb=_memory(cells[-1], columns))
        if len(ids) > 1 and "Phy-ID" in columns:
            chip.physical = ids[1]
        chips.append(chip)
    if not chips:
        raise ToolFormatError(command, *last, "a table with a chip's row")
    must_be_closed(command, output, last)
    return chips


def _memory(cell: str, columns: list[str]) -> int | None:
    """Total MB of the last usage column that is not 0: HBM where there is HBM, else DDR."""
    usages = [name for name in columns if name.endswith("-Usage(MB)")]
    pairs = re.findall(r"\d+\s*/\s*(\d+)", cell, re.ASCII)[: len(usages)]
    return next((int(total) for total in reversed(pairs) if int(total) > 0), None)


def parse_mapping(output: str) -> list[Chip]:
    """The chips of ``npu-smi info -m``, without the Mcu rows. Raises ToolFormatError.

    The runtime's id is "Chip Logic ID"; A5 prints no such column but "Chip Phy-ID".
    """
    command = " ".join(MAPPING)
    header: list[str] = []
    chips = []
    last = (0, "")
    for number, line in plain_lines(output):
        if not line.strip():
            continue
        last = (number, line)
        if not header:
            words = [word for word in re.split(r"\t+|\s{2,}", line.strip()) if word]
            if words[0] != "NPU ID" or "Chip ID" not in words or words[-1] != "Chip Name":
                raise ToolFormatError(command, number, line, "a header from 'NPU ID' to 'Chip Name'")
            header = words
            continue
        # Names have spaces and come last, so the columns before are counted.
        values = line.split(maxsplit=len(header) - 1)
        if len(values) < len(header):
            raise ToolFormatError(command, number, line, f"{len(header)} columns: {', '.join(header)}")
        row = dict(zip(header, values, strict=True))
        if row["Chip Name"].strip().lower() == "mcu":
            continue
        ids = {
            column: whole_number(command, number, line, row[column], column)
            for column in ("NPU ID", "Chip ID", "Chip Logic ID", "Chip Phy-ID")
            if column in row and row[column] != "-"
        }
        if "NPU ID" not in ids or "Chip ID" not in ids:
            raise ToolFormatError(command, number, line, "numbers as NPU ID and Chip ID")
        chips.append(
            Chip(
                ids["NPU ID"],
                ids["Chip ID"],
                row["Chip Name"].strip(),
                physical=ids.get("Chip Phy-ID"),
                logic=ids.get("Chip Logic ID"),
            )
        )
    if not chips:
        raise ToolFormatError(command, *last, "a row of a chip")
    return chips


def _key_value(command: str, output: str, key: str) -> str:
    for _, line in plain_lines(output):
        name, sign, value = line.partition(":")
        if sign and name.strip().lower() == key:
            return value.strip()
    number, line = next(((n, text) for n, text in plain_lines(output) if text.strip()), (0, ""))
    raise ToolFormatError(command, number, line, f"a line '{key}: …'")


def parse_link(command: str, output: str) -> bool:
    """``hccn_tool -i N -link -g``: "link status: UP" → True. Raises ToolFormatError."""
    status = _key_value(command, output, "link status").upper()
    if status not in ("UP", "DOWN"):
        raise ToolFormatError(command, 1, f"link status: {status}", "link status UP or DOWN")
    return status == "UP"


def parse_speed(command: str, output: str) -> float:
    """``hccn_tool -i N -speed -g``: "Speed: 200000 Mb/s" → bytes a second. Raises ToolFormatError."""
    text = _key_value(command, output, "speed")
    found = re.fullmatch(r"(\d+)\s*Mb/s", text, re.ASCII)
    if found is None:
        raise ToolFormatError(command, 1, f"Speed: {text}", "a speed in Mb/s")
    return int(found.group(1)) * 1e6 / 8


def parse_ip(command: str, output: str) -> str:
    """``hccn_tool -i N -ip -g``: the address. Raises ToolFormatError."""
    text = _key_value(command, output, "ipaddr")
    if re.fullmatch(r"[0-9a-fA-F.:]+", text, re.ASCII) is None:
        raise ToolFormatError(command, 1, f"ipaddr:{text}", "an IP address")
    return text


def parse_hccn_conf(text: str) -> dict[int, str]:
    """Device → address of ``/etc/hccn.conf`` (lines ``address_0=…``)."""
    return {int(index): address for index, address in re.findall(r"(?m)^address_(\d+)=(\S+)", text, re.ASCII)}


def probe(machine: Machine, functions: list[PciFunction]) -> Findings:
    """Devices, links and RoCE ports of this vendor. Raises ToolFormatError."""
    found = Findings()
    nodes = [name for name in machine.names("/dev") if re.fullmatch(r"davinci\d+", name)]
    asker = Asker(machine, found, expected=bool(functions or nodes))
    info = asker.ask(*INFO)
    if info is None:
        found.devices = by_address(functions)
        return found
    chips = parse_info(info)
    mapping = asker.ask(*MAPPING)
    mapped = parse_mapping(mapping) if mapping is not None else []
    _merge(chips, mapped)
    source = " ".join(INFO)
    for chip in chips:
        memory = chip.memory_mb
        found.devices.append(
            FoundDevice(
                index=_index(chip, chips),
                name=chip.name,
                pci_address=chip.address,
                node=_physical(chip, chips),
                memory_bytes=None if memory is None else Fact[int](value=memory * MIB, source=source),
            )
        )
    topology = asker.ask(*TOPOLOGY)
    if topology is not None:
        matrix = parse_matrix(" ".join(TOPOLOGY), topology, "NPU|Phy-ID")
        labels = {label: index for label in matrix.labels if (index := _labelled(label, chips)) is not None}
        for label in matrix.labels:
            if label not in labels and not label.startswith("NIC"):
                found.note(" ".join(TOPOLOGY), f"{label} is no chip of `{source}` and is left out")
        add_matrix(found, matrix, " ".join(TOPOLOGY), labels)
    _ports(asker, found, {_index(chip, chips): _physical(chip, chips) for chip in chips})
    return found


def _merge(chips: list[Chip], mapped: list[Chip]) -> None:
    by_place = {(chip.npu, chip.chip): chip for chip in mapped}
    for chip in chips:
        other = by_place.get((chip.npu, chip.chip))
        if other is not None:
            chip.logic = other.logic
            chip.physical = other.physical if chip.physical is None else chip.physical
            # The mapping's name is the chip's, and tells more than the card's ("Ascend910").
            if len(other.name) > len(chip.name):
                chip.name = other.name


def _index(chip: Chip, chips: list[Chip]) -> int:
    if chip.logic is not None:
        return chip.logic
    return chip.physical if chip.physical is not None else chips.index(chip)


def _physical(chip: Chip, chips: list[Chip]) -> int:
    """What device nodes, hccn_tool and hccn.conf count by. A card of one chip has its NPU ID, in a container too."""
    if chip.physical is not None:
        return chip.physical
    alone = sum(other.npu == chip.npu for other in chips) == 1
    return chip.npu if alone else _index(chip, chips)


def _labelled(label: str, chips: list[Chip]) -> int | None:
    if physical := re.fullmatch(r"Phy-ID(\d+)", label):
        wanted = int(physical.group(1))
        for chip in chips:
            if (chip.physical if chip.physical is not None else chip.logic) == wanted:
                return _index(chip, chips)
    elif card := re.fullmatch(r"NPU(\d+)", label):
        of_card = [chip for chip in chips if chip.npu == int(card.group(1))]
        if len(of_card) == 1:
            return _index(of_card[0], chips)
    return None


def _ports(asker: Asker, found: Findings, physical: dict[int, int]) -> None:
    """The RoCE port of each chip, by hccn_tool, else the addresses of its configuration."""
    configured = parse_hccn_conf(asker.machine.read("/etc/hccn.conf") or "")
    for device in found.devices:
        number = physical[device.index]
        at = ("hccn_tool", "-i", str(number))
        link = asker.ask(*at, "-link", "-g")
        if link is None:
            if number in configured:
                found.ports.append(FoundPort(device.index, None, None, configured[number], "/etc/hccn.conf"))
            continue
        command = " ".join((*at, "-link", "-g"))
        up = parse_link(command, link)
        speed = asker.ask(*at, "-speed", "-g") if up else None
        address = asker.ask(*at, "-ip", "-g")
        port = FoundPort(device.index, up, None, configured.get(number), command)
        if speed is not None:
            told = " ".join((*at, "-speed", "-g"))
            port.bytes_per_s = Fact[float](value=parse_speed(told, speed), source=told)
        if address is not None:
            port.address = parse_ip(" ".join((*at, "-ip", "-g")), address)
        found.ports.append(port)
