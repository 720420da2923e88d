# SPDX-License-Identifier: Apache-2.0
"""The pages of one request on offer: they follow the engine's block table and become final layer by layer."""

from __future__ import annotations

import numpy as np

from sage_kv_connector.backends.base import Descriptors, Segments
from sage_kv_connector.contract.cache_view import GroupView, KVCacheView, LayerView
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.engine.pages.layout import NULL_PAGE, PageIds, page_indices, placed
from sage_kv_connector.engine.pages.source import Cursor, PartCursor, SelectionError
from sage_kv_connector.engine.pages.target import window_segments
from sage_kv_connector.engine.session.transfer_messages import PageRuns, SubscribePart


class PagedSource:
    """Ready up to a page count for each group and layer.

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

    def set_pages(self, group: int, page_ids: PageIds) -> None:
        """The block table of a group; NULL_PAGE where the engine keeps no memory."""
        self.pages[group] = page_ids

    def advance(self, group: int, layers: slice, pages: int) -> None:
        """The first ``pages`` pages of these layers hold their final bytes. Never goes back."""
        np.maximum(self.ready[group][layers], pages, out=self.ready[group][layers])

    def advance_all(self, pages: tuple[int, ...]) -> None:
        """The first ``pages[group]`` pages of each group are final in all layers."""
        for group, count in enumerate(pages):
            self.advance(group, slice(None), count)

    def append(self, group: int, page_ids: PageIds) -> None:
        """More pages behind the last one, final in all layers."""
        self.set_pages(group, np.concatenate([self.pages[group], page_ids]))
        self.advance(group, slice(None), len(self.pages[group]))

    def end(self, pages: tuple[int, ...]) -> None:
        """The request has so many pages in each group, once they are ready."""
        self._last = pages

    def check_end(self, group: int, index: int) -> None:
        """Raises SelectionError for the page of this index if the request ended before it."""
        if self._last is not None and index >= self._last[group]:
            why = (
                f"prefill ended with {self._last[group]} pages of group {group}, number {index + 1} asked for"
            )
            raise SelectionError(why, Code.TOKENS)

    def part_pages(self, request: SubscribePart) -> list[int] | None:
        """Page ids of a part's tokens once they are final in all its layers; None until then.

        Raises SelectionError when they turn out to have no memory.
        """
        group, table = request.group, self.pages[request.group]
        size = self._view.groups[group].page_size
        if self._last is not None and request.prompt.tokens > self._last[group] * size:
            ended, wanted = self._last[group] * size, request.prompt.tokens
            raise SelectionError(
                f"prefill ended with {ended} tokens at most, {wanted} asked for", Code.TOKENS
            )
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

    def cursor(self, selection: tuple[PageRuns, ...], nbytes: int) -> Cursor:
        if not selection:
            raise SelectionError("this transfer is paged: name the pages")
        for pages in selection:
            if pages.group >= len(self._view.groups):
                raise SelectionError(f"group: {len(self._view.groups)} here, {pages.group} asked for")
        cursor = _PagedCursor(self, self._view, selection)
        if cursor.nbytes != nbytes:
            raise SelectionError(f"nbytes: the selected pages hold {cursor.nbytes} here, {nbytes} asked for")
        self._selection = selection
        return cursor

    def part(self, request: SubscribePart) -> PartCursor:
        if request.group >= len(self._view.groups):
            raise SelectionError(f"group: {len(self._view.groups)} here, {request.group} asked for")
        group = self._view.groups[request.group]
        last = request.first_layer + request.layers
        if last > len(group.layers):
            raise SelectionError(f"layers: {len(group.layers)} here, up to {last} asked for")
        self.served_parts.append(request)
        return _PagedPartCursor(self, group, request)

    def served_segments(self) -> Segments:
        """Local memory of the last subscription's pages in window order, for an audit."""
        chosen = {pages.group: self.pages[pages.group][page_indices(pages.runs)] for pages in self._selection}
        return window_segments(self._view, chosen)


class _PagedPartCursor:
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


class _PagedCursor:
    def __init__(self, source: PagedSource, view: KVCacheView, selection: tuple[PageRuns, ...]) -> None:
        self._source = source
        self._indices = {pages.group: page_indices(pages.runs) for pages in selection}
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
        found = []
        for group in {cursor.group for cursor in self._open}:
            self._source.check_end(group, int(self._indices[group][-1]))
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
            found.append(placed(cursor.layer.page_segments(ids), offset))
            cursor.sent = ready
        self._open = [c for c in self._open if c.sent < len(self._indices[c.group])]
        return np.concatenate(found) if found else None
