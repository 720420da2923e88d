# SPDX-License-Identifier: Apache-2.0
"""Plain memory and items of memory on offer: ready at once, nothing to convert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sage_kv_connector.backends.base import Descriptors, Segments
from sage_kv_connector.engine.pages.layout import gathered_segments, page_indices, placed
from sage_kv_connector.engine.pages.source import Cursor, SelectionError, TokenPages
from sage_kv_connector.engine.session.transfer_messages import PageRuns


class MemorySource:
    """Plain memory that is ready at once, all of it for every subscription."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments

    def cursor(self, selection: tuple[PageRuns, ...], nbytes: int) -> Cursor:
        if selection:
            raise SelectionError("this transfer is plain memory, it has no pages to select")
        total = int(self._segments[:, 1].sum())
        if nbytes != total:
            raise SelectionError(f"nbytes: {total} offered, {nbytes} asked for")
        return _MemoryCursor(self._segments)

    def token_pages(self) -> TokenPages:
        raise SelectionError("this transfer is plain memory, it has no tokens to convert")


class ItemSource:
    """Memory in items, ready at once; a subscription selects items as pages of group 0, or takes all.

    ``items``: the segments of each item, shape (n, 2); a window holds the selected ones in ascending order.
    """

    def __init__(self, items: Sequence[Segments]) -> None:
        self._items = items

    def cursor(self, selection: tuple[PageRuns, ...], nbytes: int) -> Cursor:
        chosen: Iterable[int] = range(len(self._items))
        if len(selection) > 1 or (selection and selection[0].group != 0):
            raise SelectionError("these are items: select them as pages of group 0")
        if selection:
            first, count = selection[0].runs[-1] if selection[0].runs else (0, 0)
            if first + count > len(self._items):
                raise SelectionError(f"items: {len(self._items)} here, up to {first + count} asked for")
            chosen = page_indices(selection[0].runs)
        return MemorySource(gathered_segments(self._items, chosen)).cursor((), nbytes)

    def token_pages(self) -> TokenPages:
        raise SelectionError("this transfer is items of memory, it has no tokens to convert")


class _MemoryCursor:
    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self.exhausted = False

    def take_ready(self) -> Descriptors | None:
        if self.exhausted:
            return None
        self.exhausted = True
        return placed(self._segments, 0)
