# SPDX-License-Identifier: Apache-2.0
"""Outputs of this vendor's tools: what its parsers read, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sage_kv_connector.hardware.probing.tool_output import parse_matrix
from sage_kv_connector.vendors.nvidia import probe as nvidia
from tests.hardware.recorded import output_of

#: Name → a parser and an output in its format.
SAMPLES: dict[str, tuple[Callable[[str], Any], str]] = {
    "nvidia-smi query": (nvidia.parse_query, output_of("nvidia", *nvidia.QUERY)),
    "nvidia-smi topo": (
        lambda text: parse_matrix("nvidia-smi topo -m", text, "GPU"),
        output_of("nvidia", *nvidia.TOPOLOGY),
    ),
}

#: Samples that are tables with a closing line, and what each row of a device has.
CLOSED: dict[str, str] = {}

#: A parser, a text that it can't read, and what it says of it.
UNREADABLE: list[tuple[Callable[[str], Any], str, str]] = [
    (nvidia.parse_query, "0, 00000000:1B:00.0, many, H100\n", "line 1.*memory in MiB .* not 'many'"),
    (nvidia.parse_query, "0, somewhere, 81559, H100\n", "a PCI address, not 'somewhere'"),
]

#: A recording, a call in it, and a change of its output: what the error says.
BROKEN: list[tuple[str, tuple[str, ...], str, str, str]] = [
    ("nvidia", nvidia.QUERY, "81559", "lots", "memory in MiB"),
    ("nvidia", nvidia.TOPOLOGY, "GPU3\tNV6\tNV6", "GPU3\tNV6\tn6", "column GPU1, not 'n6'"),
]
