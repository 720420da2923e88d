# SPDX-License-Identifier: Apache-2.0
"""Where a producer's bytes come from: pages that become ready layer by layer, or plain memory.

A source answers one question for each subscription: which descriptors are ready
now that were not handed out yet? The window is linear: group after group, in a
group layer after layer, in a layer the selected pages in ascending order, in a
page its planes; a consumer lays its segments out in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sage_kv_connector.backends.base import Descriptors, Segments
from sage_kv_connector.contract.cache_view import GroupView, KVCacheView, LayerView
from sage_kv_connector.engine.session.messages import PageRuns, SubscribePart

#: Page id of a block table entry without memory (outside a sliding window).
NULL_PAGE = -1


class SelectionError(ValueError):
    """A subscription asks for something that this source does not have."""


class Reader(Protocol):
    """One subscription's way through a source."""

    def take_ready(self) -> Descriptors | None:
        """Descriptors that became ready since the last call; None if there are none.

        Raises SelectionError when selected pages turn out to have no memory.
        """
        ...

    @property
    def exhausted(self) -> bool:
        """Everything selected was handed out."""
        ...


class PartReader(Protocol):
    """A converted part's way through a source."""

    @property
    def group(self) -> GroupView: ...

    def ready_pages(self) -> list[int] | None:
        """Page ids of the part's tokens once all of them are final; None until then.

        Raises SelectionError when they turn out to have no memory.
        """
        ...


class Source(Protocol):
    """What a transfer id stands for on the producer."""

    def reader(self, selection: tuple[PageRuns, ...], nbytes: int) -> Reader:
        """Begin to serve a subscription. Raises SelectionError."""
        ...

    def part(self, request: SubscribePart) -> PartReader:
        """Begin to serve a converted part. Raises SelectionError."""
        ...


def page_indices(runs: tuple[tuple[int, int], ...]) -> npt.NDArray[np.int64]:
    """(first, count) runs as one ascending array."""
    if not runs:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.arange(first, first + count, dtype=np.int64) for first, count in runs])


def index_runs(indices: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """The inverse of ``page_indices``."""
    if not len(indices):
        return ()
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    starts = np.concatenate([[0], cuts])
    ends = np.concatenate([cuts, [len(indices)]])
    return tuple((int(indices[a]), int(b - a)) for a, b in zip(starts, ends, strict=True))


def window_segments(view: KVCacheView, pages: dict[int, npt.NDArray[np.int64]]) -> Segments:
    """A consumer's segments for local page ids by group, in window order; shape (n, 2)."""
    parts = [
        layer.page_segments(pages[index])
        for index, group in enumerate(view.groups)
        if index in pages and len(pages[index])
        for layer in group.layers
    ]
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.uint64)


class MemorySource:
    """Plain memory that is ready at once, all of it for every subscription."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments

    def reader(self, selection: tuple[PageRuns, ...], nbytes: int) -> Reader:
        if selection:
            raise SelectionError("this transfer is plain memory, it has no pages to select")
        total = int(self._segments[:, 1].sum())
        if nbytes != total:
            raise SelectionError(f"nbytes: {total} offered, {nbytes} asked for")
        return _MemoryReader(self._segments)

    def part(self, request: SubscribePart) -> PartReader:
        raise SelectionError("this transfer is plain memory, it has no tokens to convert")


class ItemSource:
    """Memory in items, ready at once; a subscription selects items as pages of group 0, or takes all.

    ``items``: the segments of each item, shape (n, 2); a window holds the selected ones in ascending order.
    """

    def __init__(self, items: Sequence[Segments]) -> None:
        self._items = items

    def reader(self, selection: tuple[PageRuns, ...], nbytes: int) -> Reader:
        chosen: Iterable[int] = range(len(self._items))
        if len(selection) > 1 or (selection and selection[0].group != 0):
            raise SelectionError("these are items: select them as pages of group 0")
        if selection:
            first, count = selection[0].runs[-1] if selection[0].runs else (0, 0)
            if first + count > len(self._items):
                raise SelectionError(f"items: {len(self._items)} here, up to {first + count} asked for")
            chosen = page_indices(selection[0].runs)
        return MemorySource(gathered_segments(self._items, chosen)).reader((), nbytes)

    def part(self, request: SubscribePart) -> PartReader:
        raise SelectionError("this transfer is items of memory, it has no tokens to convert")


def gathered_segments(items: Sequence[Segments], chosen: Iterable[int]) -> Segments:
    """The segments of the chosen items, one after the other; shape (n, 2)."""
    parts = [items[int(index)] for index in chosen]
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.uint64)


class _MemoryReader:
    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self.exhausted = False

    def take_ready(self) -> Descriptors | None:
        if self.exhausted:
            return None
        self.exhausted = True
        return _place(self._segments, 0)


class PagedSource:
    """The pages of one request, ready up to a page count for each group and layer.

    ``set_pages`` follows the engine's block table, ``advance`` its progress, ``end`` its last page.
    A consumer with larger pages asks for tokens behind that: they come from ``padding_page``, a page of
    the engine's that never holds anybody's KV; without one they are refused.
    """

    def __init__(self, view: KVCacheView, padding_page: int | None = None) -> None:
        self._view = view
        self._padding_page = padding_page
        self._last: tuple[int, ...] | None = None
        self.pages = [np.zeros(0, dtype=np.int64) for _ in view.groups]
        self.ready = [np.zeros(len(group.layers), dtype=np.int64) for group in view.groups]
        self._selection: tuple[PageRuns, ...] = ()
        self.served_parts: list[SubscribePart] = []

    def set_pages(self, group: int, page_ids: npt.NDArray[np.int64]) -> None:
        """The block table of a group; NULL_PAGE where the engine keeps no memory."""
        self.pages[group] = page_ids

    def advance(self, group: int, layers: slice, pages: int) -> None:
        """The first ``pages`` pages of these layers hold their final bytes. Never goes back."""
        np.maximum(self.ready[group][layers], pages, out=self.ready[group][layers])

    def append(self, group: int, page_ids: npt.NDArray[np.int64]) -> None:
        """More pages behind the last one, final in all layers."""
        self.set_pages(group, np.concatenate([self.pages[group], page_ids]))
        self.advance(group, slice(None), len(self.pages[group]))

    def end(self, pages: tuple[int, ...]) -> None:
        """The request has so many pages in each group, once they are ready."""
        self._last = pages

    def part_pages(self, request: SubscribePart) -> list[int] | None:
        """Page ids of a part's tokens once they are final in all its layers; None until then.

        Raises SelectionError when they turn out to have no memory.
        """
        group, table = request.group, self.pages[request.group]
        size = self._view.groups[group].page_size
        first, end = request.first_token // size, -(-(request.first_token + request.tokens) // size)
        held = end if self._last is None or self._padding_page is None else min(end, self._last[group])
        layers = slice(request.first_layer, request.first_layer + request.layers)
        if int(self.ready[group][layers].min()) < held:
            return None
        if held > len(table):
            raise SelectionError(f"page {held - 1} of group {group} is beyond the {len(table)} here")
        ids = table[first:held]
        if (ids == NULL_PAGE).any():
            raise SelectionError(f"a page of group {group} is no longer kept here")
        assert self._padding_page is not None or held == end
        return [int(page) for page in ids] + [self._padding_page or 0] * (end - max(first, held))

    def reader(self, selection: tuple[PageRuns, ...], nbytes: int) -> Reader:
        if not selection:
            raise SelectionError("this transfer is paged: name the pages")
        for part in selection:
            if part.group >= len(self._view.groups):
                raise SelectionError(f"group: {len(self._view.groups)} here, {part.group} asked for")
        reader = _PagedReader(self, self._view, selection)
        if reader.nbytes != nbytes:
            raise SelectionError(f"nbytes: the selected pages hold {reader.nbytes} here, {nbytes} asked for")
        self._selection = selection
        return reader

    def part(self, request: SubscribePart) -> PartReader:
        if request.group >= len(self._view.groups):
            raise SelectionError(f"group: {len(self._view.groups)} here, {request.group} asked for")
        group = self._view.groups[request.group]
        last = request.first_layer + request.layers
        if last > len(group.layers):
            raise SelectionError(f"layers: {len(group.layers)} here, up to {last} asked for")
        self.served_parts.append(request)
        return _PartReader(self, group, request)

    def served_segments(self) -> Segments:
        """Local memory of the last subscription's pages in window order, for an audit."""
        chosen = {part.group: self.pages[part.group][page_indices(part.runs)] for part in self._selection}
        return window_segments(self._view, chosen)


class _PartReader:
    def __init__(self, source: PagedSource, group: GroupView, request: SubscribePart) -> None:
        self.group = group
        self._source = source
        self._request = request

    def ready_pages(self) -> list[int] | None:
        return self._source.part_pages(self._request)


class _LayerCursor:
    """How far one layer of the selection was handed out."""

    __slots__ = ("base", "group", "index", "layer", "sent")

    def __init__(self, group: int, index: int, layer: LayerView, base: int) -> None:
        self.group, self.index, self.layer, self.base, self.sent = group, index, layer, base, 0


class _PagedReader:
    def __init__(self, source: PagedSource, view: KVCacheView, selection: tuple[PageRuns, ...]) -> None:
        self._source = source
        self._indices = {part.group: page_indices(part.runs) for part in selection}
        self._open: list[_LayerCursor] = []
        self.nbytes = 0
        for group_index, group in enumerate(view.groups):
            count = len(self._indices.get(group_index, ()))
            if not count:
                continue
            for index, layer in enumerate(group.layers):
                self._open.append(_LayerCursor(group_index, index, layer, self.nbytes))
                self.nbytes += count * layer.page_bytes

    @property
    def exhausted(self) -> bool:
        return not self._open

    def take_ready(self) -> Descriptors | None:
        parts = []
        for cursor in self._open:
            indices = self._indices[cursor.group]
            ready = int(np.searchsorted(indices, self._source.ready[cursor.group][cursor.index]))
            if ready <= cursor.sent:
                continue
            table = self._source.pages[cursor.group]
            chosen = indices[cursor.sent : ready]
            if chosen[-1] >= len(table):
                raise SelectionError(
                    f"page {int(chosen[-1])} of group {cursor.group} is beyond the {len(table)} here"
                )
            ids = table[chosen]
            if (ids == NULL_PAGE).any():
                missing = int(chosen[ids == NULL_PAGE][0])
                raise SelectionError(f"page {missing} of group {cursor.group} is no longer kept here")
            offset = cursor.base + cursor.sent * cursor.layer.page_bytes
            parts.append(_place(cursor.layer.page_segments(ids), offset))
            cursor.sent = ready
        self._open = [c for c in self._open if c.sent < len(self._indices[c.group])]
        return np.concatenate(parts) if parts else None


def _place(segments: Segments, offset: int) -> Descriptors:
    """Descriptors that put ``segments`` one after the other into the window from ``offset``."""
    lengths = segments[:, 1]
    descriptors = np.empty((len(segments), 3), dtype=np.uint64)
    descriptors[:, 0] = segments[:, 0]
    descriptors[:, 1] = np.uint64(offset) + np.cumsum(lengths) - lengths
    descriptors[:, 2] = lengths
    return descriptors
