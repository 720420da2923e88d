# SPDX-License-Identifier: Apache-2.0
"""Outputs of this vendor's tools: what its parsers read, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.hardware.probing.tool_output import parse_matrix
from sage_kv_connector.vendors.ascend import probe as ascend
from tests.hardware.recorded import output_of

#: Name → a parser and an output in its format.
SAMPLES: dict[str, tuple[Callable[[str], Any], str]] = {
    "npu-smi A2": (ascend.parse_info, output_of("ascend_a2", *ascend.INFO)),
    "npu-smi A3": (ascend.parse_info, output_of("ascend_a3", *ascend.INFO)),
    "npu-smi 310P": (ascend.parse_info, output_of("ascend_pcie", *ascend.INFO)),
    "mapping A2": (ascend.parse_mapping, output_of("ascend_a2", *ascend.MAPPING)),
    "mapping A3": (ascend.parse_mapping, output_of("ascend_a3", *ascend.MAPPING)),
    "mapping A5": (ascend.parse_mapping, output_of("ascend_a5", *ascend.MAPPING)),
    "topology A2": (
        lambda text: parse_matrix("npu-smi info -t topo", text, "NPU|Phy-ID"),
        output_of("ascend_a2", *ascend.TOPOLOGY),
    ),
    "topology A3": (
        lambda text: parse_matrix("npu-smi info -t topo", text, "NPU|Phy-ID"),
        output_of("ascend_a3", *ascend.TOPOLOGY),
    ),
    "topology A5": (
        lambda text: parse_matrix("npu-smi info -t topo", text, "NPU|Phy-ID"),
        output_of("ascend_a5", *ascend.TOPOLOGY),
    ),
    "topology PCIe": (
        lambda text: parse_matrix("npu-smi info -t topo", text, "NPU|Phy-ID"),
        output_of("ascend_pcie", *ascend.TOPOLOGY),
    ),
}

#: Samples that are tables with a closing line, and what each row of a device has.
CLOSED: dict[str, str] = {"npu-smi A2": "/ 65536", "npu-smi 310P": "44280"}

#: A parser, a text that it can't read, and what it says of it.
UNREADABLE: list[tuple[Callable[[str], Any], str, str]] = [
    (ascend.parse_info, "npu-smi: command failed\n", "no line of its output"),
    (ascend.parse_info, "| 0     910B3     | OK | 96 |\n", "line 1"),
    (ascend.parse_mapping, "NPU  Chip  Name\n0 0 x\n", "line 1: 'NPU  Chip  Name'"),
    (
        ascend.parse_mapping,
        "\tNPU ID    Chip ID    Chip Logic ID    Chip Name\n\tx    0    0    Ascend 910B3\n",
        r"line 2: '\\tx .*NPU ID as a whole number, not 'x'",
    ),
    (lambda text: ascend.parse_link("t", text), "link status: MAYBE\n", "UP or DOWN"),
    (lambda text: ascend.parse_speed("t", text), "Speed: fast\n", "in Mb/s"),
    (lambda text: ascend.parse_ip("t", text), "no address\n", "a line 'ipaddr: …'"),
]

#: A recording, a call in it, and a change of its output: what the error says.
BROKEN: list[tuple[str, tuple[str, ...], str, str, str]] = [
    ("ascend_a2", ascend.INFO, "0000:C2:00.0", "lost        ", "`npu-smi info` line 11: .* NPU and name"),
    ("ascend_a2", ascend.MAPPING, "Chip ID", "Chip", "line 1: .* a header from 'NPU ID'"),
    ("ascend_a2", ascend.TOPOLOGY, "NPU4       HCCS ", "NPU4       !!!! ", "column NPU0, not '!!!!'"),
    ("ascend_a2", ("hccn_tool", "-i", "2", "-speed", "-g"), "Mb/s", "furlongs", "a speed in Mb/s"),
]
