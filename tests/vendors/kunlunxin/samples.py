# SPDX-License-Identifier: Apache-2.0
"""Outputs of this vendor's tools: what its parsers read, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.hardware.probing.tool_output import parse_matrix
from sage_kv_connector.vendors.kunlunxin import probe as kunlunxin
from tests.hardware.recorded import output_of

#: Name → a parser and an output in its format.
SAMPLES: dict[str, tuple[Callable[[str], Any], str]] = {
    "xpu-smi": (kunlunxin.parse_table, output_of("kunlunxin", *kunlunxin.TABLE)),
    "xpu-smi topo": (
        lambda text: parse_matrix("xpu-smi topo -m", text, "XPU"),
        output_of("kunlunxin", *kunlunxin.TOPOLOGY),
    ),
}

#: Samples that are tables with a closing line, and what each row of a device has.
CLOSED: dict[str, str] = {"xpu-smi": "98304"}

#: A parser, a text that it can't read, and what it says of it.
UNREADABLE: list[tuple[Callable[[str], Any], str, str]] = [
    (kunlunxin.parse_table, "|=====+=====+=====|\n| 0 P800 N/A | no bus id | 0 |\n", "line 2.*Bus-Id"),
]

#: A recording, a call in it, and a change of its output: what the error says.
BROKEN: list[tuple[str, tuple[str, ...], str, str, str]] = [
    ("kunlunxin", kunlunxin.TABLE, "98304MiB", "most", "MiB / …MiB"),
    ("kunlunxin", kunlunxin.TOPOLOGY, "XPU7\tSYS", "XPU9\tSYS", "a row of XPU0"),
]
