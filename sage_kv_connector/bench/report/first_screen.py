# SPDX-License-Identifier: Apache-2.0
"""The table that a README begins with, between two marks: throughput over a slow link, to a peer's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sage_kv_connector.bench.marked import begin, written
from sage_kv_connector.bench.report.goals import BASELINE, LONG

BEGIN = begin()
ARMS = {"ours-bf16": "bf16", "ours-fp8": "fp8", "ours-int4": "int4"}
LINK, DISPATCH, LOADS = "1g", "sequential", ("closed-4", "rag")

Row = dict[str, Any]


def with_table(text: str, ratios: Sequence[Row]) -> str:
    """``text`` with its table written anew; as it is, without marks."""
    return written(text, BEGIN, _table(ratios))


def _table(ratios: Sequence[Row]) -> Iterator[str]:
    """Prompts a second, times the baseline's, by length and load; empty cells were not measured."""
    found = {
        (row["tokens"], row["load"], row["arm"]): row["ratio"]
        for row in ratios
        if (row["link"], row["dispatch"], row["peer"], row["what"])
        == (LINK, DISPATCH, BASELINE, "throughput")
    }
    yield f"| | {' | '.join(ARMS.values())} |"
    yield f"|---|{'---|' * len(ARMS)}"
    for load in LOADS:
        for tokens in LONG:
            cells = [found.get((tokens, load, arm)) for arm in ARMS]
            if any(cells):
                shown = " | ".join("" if cell is None else f"{cell:.1f} ×" for cell in cells)
                yield f"| {tokens // 1024}K tokens, {load} | {shown} |"
