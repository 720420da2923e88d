# SPDX-License-Identifier: Apache-2.0
"""What the page's tables have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]
#: A command's JSON, in the order in which the section names the commands.
Results = Sequence[Row]


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
