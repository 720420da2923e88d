# SPDX-License-Identifier: Apache-2.0
"""Outputs of this vendor's tools: what its parsers read, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.hardware.probing.tool_output import parse_matrix
from sage_kv_connector.vendors.cambricon import probe as cambricon
from tests.hardware.recorded import output_of

#: Name → a parser and an output in its format.
SAMPLES: dict[str, tuple[Callable[[str], Any], str]] = {
    "cnmon 5.10.22": (cambricon.parse_table, output_of("cambricon", *cambricon.TABLE)),
    "cnmon 5.10.13": (cambricon.parse_table, output_of("cambricon_sriov", *cambricon.TABLE)),
    "cnmon 4.20.11": (cambricon.parse_table, output_of("cambricon_v4", *cambricon.TABLE)),
    "cnmon topo": (
        lambda text: parse_matrix("cnmon topo -m", text, "MLU"),
        output_of("cambricon", *cambricon.TOPOLOGY),
    ),
}

#: Samples that are tables with a closing line, and what each row of a device has.
CLOSED: dict[str, str] = {"cnmon 5.10.22": "23374"}

#: A parser, a text that it can't read, and what it says of it.
UNREADABLE: list[tuple[Callable[[str], Any], str, str]] = [
    (cambricon.parse_table, "| 0  /  MLU370 v1 | 0000:13:00.0 | 0% |\n", "line 1.*headers"),
]

#: A recording, a call in it, and a change of its output: what the error says.
BROKEN: list[tuple[str, tuple[str, ...], str, str, str]] = [
    ("cambricon", cambricon.TABLE, "0000:16:00.0", "unknown     ", "line 11: .* a PCI address under Bus-Id"),
    ("cambricon", cambricon.TOPOLOGY, "MLU3    MLK", "MLU3", "line 5: .* a link's word in column MLU3"),
]
