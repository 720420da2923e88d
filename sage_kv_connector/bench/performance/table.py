# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of the page's figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]
#: A command's JSON, in the order in which the section names the commands.
Results = Sequence[Row]


def table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def left_out(results: Results) -> Iterator[str]:
    """Peers that did not run, each once, with the first line of the reason."""
    missing = {name: why for result in results for name, why in result["missing"].items()}
    for name, why in missing.items():
        yield ""
        yield f"Left out: {name}: {why.splitlines()[0]}"


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.0f}"


def two(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.2f}"
