# SPDX-License-Identifier: Apache-2.0
"""What ``bench report`` writes into pages: tables, and parts between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

END = "<!-- up to here -->"


def begin(name: str = "") -> str:
    """The mark before the part of this name."""
    return f"<!-- bench report writes {name or 'this'} -->"


def written(text: str, mark: str, lines: Iterable[str]) -> str:
    """``text`` with what is between ``mark`` and the next end written anew; as it is, without these marks."""
    head, found, rest = text.partition(mark)
    _, end, tail = rest.partition(END)
    if not found or not end:
        return text
    return "\n".join([head + mark, *lines, END + tail])


def table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
