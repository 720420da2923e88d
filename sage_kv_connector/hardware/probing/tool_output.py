# SPDX-License-Identifier: Apache-2.0
"""Reading what tools print: the error that names a line, tables with borders, matrices, JSON."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
#: Columns stand apart by tabs or at least two spaces; "CPU Affinity" is one column.
_GAP = re.compile(r"\t+|\s{2,}")
#: Words of a matrix cell that tools use, and forms new drivers may add.
_CELL = re.compile(r"[A-Z][A-Z0-9_/-]*|[0-9]+(\.[0-9]+)?|-|None", re.ASCII)
#: domain:bus:device.function; NVIDIA-like tools print an eight-digit domain.
PCI_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{4,8}):)?([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])", re.ASCII)


class ToolFormatError(ValueError):
    """A tool's output has a line that can't be read; the text names tool, line and what was expected."""

    def __init__(self, command: str, number: int, line: str, expected: str) -> None:
        shown = line if len(line) <= 160 else line[:157] + "..."
        where = f"line {number}: {shown!r}" if number else "no line of its output"
        super().__init__(f"`{command}` {where}: expected {expected}")
        self.command, self.number, self.line, self.expected = command, number, line, expected


def plain_lines(output: str) -> list[tuple[int, str]]:
    """Numbered lines (from 1) without ANSI codes and trailing space."""
    return [(number, _ANSI.sub("", line).rstrip()) for number, line in enumerate(output.splitlines(), 1)]


def pci_address(text: str) -> str | None:
    """``00000000:03:00.0`` → ``0000:03:00.0``, in lower case; None if it is no address."""
    found = PCI_ADDRESS.fullmatch(text.strip())
    if found is None:
        return None
    domain, bus, device, function = found.groups()
    return f"{int(domain or '0', 16):04x}:{bus}:{device}.{function}".lower()


def bordered(line: str) -> list[str] | None:
    """Cells of a ``| a | b |`` line; None for borders and everything else."""
    text = line.strip()
    if len(text) < 3 or text[0] != "|" or text[-1] != "|" or set(text) <= set("|=-+ "):
        return None
    return [cell.strip() for cell in text[1:-1].split("|")]


def must_be_closed(command: str, output: str, row: tuple[int, str]) -> None:
    """Raise ToolFormatError if no border follows a table's last row: the output was cut."""
    for number, line in plain_lines(output):
        if number > row[0] and line.strip().startswith("+") and set(line.strip()) <= set("+-="):
            return
    raise ToolFormatError(command, *row, "the table's closing line after it")


class Matrix(NamedTuple):
    """A topology matrix: ``cells[a, b]`` is the tool's word, ``extras[a][column]`` what stands beside."""

    labels: list[str]
    cells: dict[tuple[str, str], str]
    extras: dict[str, dict[str, str]]
    legend: dict[str, str]  #: what "NIC0" stands for


def parse_matrix(command: str, output: str, prefix: str) -> Matrix:
    """Read a matrix whose row and column labels of devices begin with ``prefix`` ("GPU", "NPU|Phy-ID").

    Columns that are not known stand beside the matrix and are kept by name. Raises ToolFormatError.
    """
    device = re.compile(rf"(?:{prefix})\d+", re.ASCII)
    header: list[str] | None = None
    labels: list[str] = []
    cells: dict[tuple[str, str], str] = {}
    extras: dict[str, dict[str, str]] = {}
    legend: dict[str, str] = {}
    last = (0, "")
    for number, line in plain_lines(output):
        words = [word.strip() for word in _GAP.split(line.strip()) if word.strip()]
        if header is None:
            if words and device.fullmatch(words[0]) and _is_header(words, device):
                header = words
                labels = _matrix_labels(words)
                last = (number, line)
            continue
        if not words:
            continue
        if named := re.fullmatch(r"(NIC\d+)\s*:\s*(\S+)", line.strip()):
            legend[named.group(1)] = named.group(2)
            continue
        row = words[0]
        if row not in labels or row in extras:
            if device.match(row):
                raise ToolFormatError(command, number, line, f"a row of {', '.join(labels)}")
            continue
        values = words[1:]
        if len(values) < len(labels):
            raise ToolFormatError(command, number, line, f"{len(labels)} cells after {row}")
        for label, value in zip(labels, values[: len(labels)], strict=True):
            if _CELL.fullmatch(value) is None:
                raise ToolFormatError(
                    command, number, line, f"a link's word in column {label}, not {value!r}"
                )
            cells[row, label] = value
        extras[row] = _beside(header[len(labels) :], values[len(labels) :])
        last = (number, line)
    if header is None:
        raise ToolFormatError(
            command, *_first_line(output), f"a header of columns named {prefix.replace('|', '# or ')}#"
        )
    for label in labels:
        if device.fullmatch(label) and label not in extras:
            raise ToolFormatError(command, last[0], last[1], f"a row of {label} after it")
    return Matrix(labels, cells, extras, legend)


def _beside(columns: list[str], values: list[str]) -> dict[str, str]:
    """What stands beside a row. Blank cells can't be told apart, so a short row keeps only a list of CPUs."""
    if len(values) >= len(columns):
        return dict(zip(columns, values, strict=False))
    if values and re.search(r"\d[-,]\d", values[0]):
        return {columns[0]: values[0]}
    return {}


def _is_header(words: list[str], device: re.Pattern[str]) -> bool:
    """A header's second word is a label or a column's name; a row's is a link's word.

    A machine with one device has the header "NPU0  CPU Affinity" and the row "NPU0  X  0-23".
    """
    if len(words) == 1:
        return True
    second = words[1]
    if device.fullmatch(second) or re.fullmatch(r"NIC\d+", second) or not _CELL.fullmatch(second):
        return True
    return any("affinity" in word.lower() for word in words)


def _matrix_labels(header: list[str]) -> list[str]:
    for place, word in enumerate(header):
        if "affinity" in word.lower() or "numa" in word.lower():
            return header[:place]
    return header


def _first_line(output: str) -> tuple[int, str]:
    return next(((number, line) for number, line in plain_lines(output) if line.strip()), (0, ""))


def parse_json(command: str, output: str) -> dict[str, Any]:
    """The JSON object in an output, behind any lines of a logger. Raises ToolFormatError."""
    lines = plain_lines(output)
    begin = next((at for at, (_, line) in enumerate(lines) if line.lstrip().startswith("{")), None)
    if begin is None:
        raise ToolFormatError(command, *_first_line(output), "a JSON object")
    try:
        found, _ = json.JSONDecoder().raw_decode("\n".join(line for _, line in lines[begin:]).lstrip())
    except json.JSONDecodeError as error:
        number = min(begin + error.lineno - 1, len(lines) - 1)
        raise ToolFormatError(command, *lines[number], f"JSON ({error.msg})") from error
    if not isinstance(found, dict):
        raise ToolFormatError(command, *lines[begin], "a JSON object")
    return found


def whole_number(command: str, number: int, line: str, text: str, what: str) -> int:
    """``text`` as a whole number. Raises ToolFormatError."""
    if not re.fullmatch(r"\d{1,15}", text.strip(), re.ASCII):
        raise ToolFormatError(command, number, line, f"{what} as a whole number, not {text.strip()!r}")
    return int(text)
