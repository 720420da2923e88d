# SPDX-License-Identifier: Apache-2.0
"""Outputs of this vendor's tools: what its parsers read, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.vendors.hygon import probe as hygon
from tests.hardware.recorded import output_of

#: Name → a parser and an output in its format.
SAMPLES: dict[str, tuple[Callable[[str], Any], str]] = {
    "hy-smi BW1000": (lambda text: hygon.parse_table("hy-smi", text), output_of("hygon", "hy-smi")),
    "rocm-smi Z100": (lambda text: hygon.parse_table("rocm-smi", text), output_of("hygon_z100", "rocm-smi")),
    "hy-smi topology": (
        lambda text: hygon.parse_topology("hy-smi --showtopo", text),
        output_of("hygon", "hy-smi", "--showtopo"),
    ),
    "rocm-smi topology": (
        lambda text: hygon.parse_topology("rocm-smi --showtopo", text),
        output_of("hygon_z100", "rocm-smi", "--showtopo"),
    ),
    "hy-smi memory": (
        lambda text: hygon.parse_cards("hy-smi", text, ("VRAM Total Memory (B)",)),
        output_of("hygon", "hy-smi", "--showmeminfo", "vram", "--json"),
    ),
}

#: Samples that are tables with a closing line, and what each row of a device has.
CLOSED: dict[str, str] = {}

#: A parser, a text that it can't read, and what it says of it.
UNREADABLE: list[tuple[Callable[[str], Any], str, str]] = [
    (
        lambda text: hygon.parse_table("hy-smi", text),
        "HCU  Temp  Mode\n0  50C\n",
        r"`hy-smi` line 2: '0  50C': expected 3 columns: HCU Temp Mode",
    ),
    (
        lambda text: hygon.parse_cards("t", text, ("PCI Bus",)),
        '{"card0": {"Bus": "1"}}',
        "PCI Bus of card0",
    ),
    (
        lambda text: hygon.parse_topology("t", text),
        "= Link Type between two HCUs =\n  HCU0  HCU1\nHCU0  0  HSW\nHCU1  HSW  0\n== Numa Nodes ==\nHCU[0] x\n",
        "line 6: 'HCU\\[0\\] x'",
    ),
]

#: A recording, a call in it, and a change of its output: what the error says.
BROKEN: list[tuple[str, tuple[str, ...], str, str, str]] = [
    ("hygon", ("hy-smi",), "81.0W    auto", "81.0W", "expected 10 columns"),
    ("hygon", ("hy-smi", "--showtopo"), "Link Type", "Kind", "a section 'Link Type between two"),
    ("hygon", ("hy-smi", "--showbus", "--json"), "}}", "", "expected JSON"),
]
