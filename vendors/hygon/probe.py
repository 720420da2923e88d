# SPDX-License-Identifier: Apache-2.0
"""Hygon: ``hy-smi``, on older stacks ``rocm-smi``, whose options and sections it follows.

The table is from public outputs of Z100, K100 and BW1000 hosts, which differ in columns and in
the word for a device (DCU, HCU). ``--showtopo`` is upstream's format, in which the vendor's
tool is said to print HCU for GPU and no colon behind "Numa Node"; both are read. The JSON keys
are upstream's, from two programs that read them. Never run on a card.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sage_kv_connector.hardware.probing.accelerator_descriptor import Fact
from sage_kv_connector.hardware.probing.findings import Asker, Findings, FoundDevice, FoundLink, by_address
from sage_kv_connector.hardware.probing.machine import Machine, ToolState
from sage_kv_connector.hardware.probing.sysfs import PciFunction
from sage_kv_connector.hardware.probing.tool_output import (
    Matrix,
    ToolFormatError,
    parse_json,
    parse_matrix,
    pci_address,
    plain_lines,
    whole_number,
)

TOOLS = ("hy-smi", "rocm-smi")
_DEVICE = "HCU|DCU|GPU"


def parse_table(tool: str, output: str) -> list[int]:
    """The devices' numbers. Columns are counted by the header, whatever they are. Raises ToolFormatError."""
    header: list[str] | None = None
    devices: list[int] = []
    last = (0, "")
    for number, line in plain_lines(output):
        words = line.split()
        if not words or words[0].startswith("="):
            if header is not None and devices:
                break  # the table can be printed twice, with other columns
            continue
        last = (number, line)
        if words[0] in ("HCU", "DCU", "GPU"):
            header = words
        elif header is not None:
            if len(words) != len(header):
                raise ToolFormatError(tool, number, line, f"{len(header)} columns: {' '.join(header)}")
            devices.append(whole_number(tool, number, line, words[0], f"the {header[0]}"))
    if not devices:
        raise ToolFormatError(tool, *last, "a header that begins with HCU or DCU, and a row a device")
    return devices


def _sections(output: str) -> Iterator[tuple[str, int, str]]:
    """Title, the line number it stands on, and text of each section."""
    title, start, body = "", 0, list[str]()
    for number, line in plain_lines(output):
        if named := re.fullmatch(r"=+ ?([^=]*?) ?=+", line.strip()):
            yield title, start, "\n".join(body)
            title, start, body = named.group(1), number, []
        else:
            body.append(line)
    yield title, start, "\n".join(body)


def parse_topology(command: str, output: str) -> tuple[dict[str, Matrix], dict[int, int]]:
    """Matrices by section ("hops", "link type"), and NUMA nodes. Raises ToolFormatError."""
    matrices: dict[str, Matrix] = {}
    nodes: dict[int, int] = {}
    for title, start, body in _sections(output):
        words = title.lower()
        for name in ("hops", "link type"):
            if words.startswith(f"{name} between two"):
                # Blank lines in front keep the numbers of the lines right.
                matrices[name] = parse_matrix(command, "\n" * start + body, _DEVICE)
        if words.startswith("numa nodes"):
            for number, line in plain_lines("\n" * start + body):
                if not line.strip() or "Numa Affinity" in line:
                    continue
                told = re.fullmatch(
                    rf"(?:{_DEVICE})\[(\d+)\]\s*:\s*\(Topology\) Numa Node:?\s+(-?\d+)",
                    line.strip(),
                    re.ASCII,
                )
                if told is None:
                    raise ToolFormatError(command, number, line, "'HCU[n] : (Topology) Numa Node: n'")
                nodes[int(told.group(1))] = int(told.group(2))
    if "link type" not in matrices:
        number, line = next(((n, text) for n, text in plain_lines(output) if text.strip()), (0, ""))
        raise ToolFormatError(command, number, line, "a section 'Link Type between two …'")
    return matrices, nodes


def parse_cards(command: str, output: str, keys: tuple[str, ...]) -> dict[int, str]:
    """Card → the first of ``keys`` (case ignored) in a ``--json`` answer. Raises ToolFormatError."""
    found = {}
    for name, values in parse_json(command, output).items():
        card = re.fullmatch(r"card(\d+)", name, re.ASCII)
        if card is None or not isinstance(values, dict):
            continue
        low: dict[str, Any] = {str(key).lower(): value for key, value in values.items()}
        value = next((low[key.lower()] for key in keys if key.lower() in low), None)
        if value is None:
            raise ToolFormatError(command, 0, "", f"{' or '.join(keys)} of {name}")
        found[int(card.group(1))] = str(value)
    if not found:
        raise ToolFormatError(command, 0, "", "an object of card0, card1 …")
    return found


def _number(command: str, text: str, what: str) -> int:
    if re.fullmatch(r"-?\d+", text.strip(), re.ASCII) is None:
        raise ToolFormatError(command, 0, "", f"{what} as a whole number, not {text!r}")
    return int(text)


def probe(machine: Machine, functions: list[PciFunction]) -> Findings:
    """Devices and links of this vendor. Raises ToolFormatError."""
    found = Findings()
    if not functions:
        # AMD's cards answer the same tools; only the PCI vendor tells whose they are.
        return found
    asker = Asker(machine, found, expected=True)
    tool = next((name for name in TOOLS if machine.run((name,)).state is not ToolState.missing), TOOLS[0])
    table = asker.ask(tool)
    if table is None:
        found.devices = by_address(functions)
        return found
    found.devices = [FoundDevice(index) for index in parse_table(tool, table)]
    known = {device.index: device for device in found.devices}
    _addresses(asker, tool, functions, known)
    for argument, keys in (("--showproductname", ("Card Series", "Card Model")), ("--showmeminfo", ())):
        argv = (tool, argument, *(("vram",) if not keys else ()), "--json")
        answer = asker.ask(*argv)
        if answer is None:
            continue
        command = " ".join(argv)
        for index, value in parse_cards(command, answer, keys or ("VRAM Total Memory (B)",)).items():
            if index in known and keys:
                known[index].name = value
            elif index in known:
                total = _number(command, value, "VRAM Total Memory (B)")
                known[index].memory_bytes = Fact[int](value=total, source=command)
    _topology(asker, tool, found, known)
    return found


def _addresses(asker: Asker, tool: str, functions: list[PciFunction], known: dict[int, FoundDevice]) -> None:
    argv = (tool, "--showbus", "--json")
    answer = asker.ask(*argv)
    if answer is not None:
        for index, text in parse_cards(" ".join(argv), answer, ("PCI Bus",)).items():
            address = pci_address(text)
            if address is None:
                raise ToolFormatError(" ".join(argv), 0, "", f"a PCI address of card{index}, not {text!r}")
            if index in known:
                known[index].pci_address = address
        return
    ordered = sorted(function.address for function in functions)
    if len(ordered) == len(known):
        for address, index in zip(ordered, sorted(known), strict=True):
            known[index].pci_address = address
        asker.findings.note(" ".join(argv), "no bus ids: cards are taken in the order of PCI addresses")


def _topology(asker: Asker, tool: str, found: Findings, known: dict[int, FoundDevice]) -> None:
    argv = (tool, "--showtopo")
    command = " ".join(argv)
    answer = asker.ask(*argv)
    nodes: dict[int, int] = {}
    source = command
    if answer is not None:
        matrices, nodes = parse_topology(command, answer)
        kinds, hops = matrices["link type"], matrices.get("hops")
        for place, a in enumerate(kinds.labels):
            for b in kinds.labels[place + 1 :]:
                first, second = (int(re.sub(r"\D", "", label)) for label in (a, b))
                word = kinds.cells.get((a, b), "0")
                if word == "0" or first not in known or second not in known:
                    continue
                counted = hops.cells.get((a, b), "") if hops is not None else ""
                hop = Fact[int](value=int(counted), source=command) if counted.isdigit() else None
                found.links.append(FoundLink(first, second, word, command, hop))
    told = asker.ask(tool, "--showtoponuma", "--json")
    if told is not None:
        source = f"{tool} --showtoponuma --json"
        cards = parse_cards(source, told, ("(Topology) Numa Node",))
        nodes = {index: _number(source, value, "Numa Node") for index, value in cards.items()}
    for index, node in nodes.items():
        if index in known and node >= 0:
            known[index].numa_node = Fact[int](value=node, source=source)
