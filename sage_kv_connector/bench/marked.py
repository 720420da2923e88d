# SPDX-License-Identifier: Apache-2.0
"""Parts of a page that ``bench report`` writes, between two marks."""

from __future__ import annotations

from collections.abc import Iterable

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
