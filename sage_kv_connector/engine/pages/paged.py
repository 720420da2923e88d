# SPDX-License-Identifier: Apache-2.0
"""Pages of a KV cache as a source: its block tables grow and its pages become final while prefill computes.

Tables and counters lie in the data plane (``csrc/paged/page_tables.h``): the engine's own thread changes them, and
lanes that wait for it go on by themselves. A backend that does not know pages asks a ``cursor`` again on the control
thread.
"""

from __future__ import annotations

import numpy as np

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Descriptors, Segments, Status
from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.engine.pages.layout import PageIds, page_indices, page_layout
from sage_kv_connector.engine.pages.source import Converted, Cursor, SelectionError, TokenPages
from sage_kv_connector.engine.pages.target import window_segments
from sage_kv_connector.engine.session.transfer_messages import PageRuns


class PagedSource:
    """Ready up to a page count for each group and layer.

    ``set_pages`` and ``grow`` follow the engine's block table, ``advance`` its progress, ``end`` its last page; any
    thread may call these, one at a time. A consumer with larger pages asks for tokens behind that: they come from
    ``padding_page``, a page of the engine's that never holds anybody's KV; without one they are refused.
    """

    def __init__(self, view: KVCacheView, padding_page: int | None = None) -> None:
        self._view = view
        self._padding_page = padding_page
        self.tables = _data_plane.PageTables([len(group.layers) for group in view.groups])
        self._selection: tuple[PageRuns, ...] = ()
        self.converted: list[Converted] = []  #: what was served in parts, for an audit

    # -- the engine's side

    def set_pages(self, group: int, page_ids: PageIds) -> None:
        """The block table of a group; NULL_PAGE where the engine keeps no memory."""
        self.tables.set_pages(group, np.ascontiguousarray(page_ids, dtype=np.int64))

    def grow(self, group: int, page_ids: PageIds) -> None:
        """More pages behind the last one; NULL_PAGE as in ``set_pages``."""
        self.tables.append(group, np.ascontiguousarray(page_ids, dtype=np.int64))

    def append(self, group: int, page_ids: PageIds) -> None:
        """More pages behind the last one, final in all layers."""
        self.grow(group, page_ids)
        self.advance(group, slice(None), self.tables.length(group))

    def advance(self, group: int, layers: slice, pages: int) -> None:
        """The first ``pages`` pages of these layers hold their final bytes. Never goes back."""
        first, end, _ = layers.indices(len(self._view.groups[group].layers))
        self.tables.advance(group, first, end - first, pages)

    def advance_all(self, pages: tuple[int, ...]) -> None:
        """The first ``pages[group]`` pages of each group are final in all layers."""
        self.tables.advance_all(pages)

    def end(self, pages: tuple[int, ...]) -> None:
        """The request has so many pages in each group, once they are ready."""
        self.tables.end(pages)

    def end_here(self) -> None:
        """No more pages follow."""
        self.end(tuple(self.tables.length(group) for group in range(len(self._view.groups))))

    # -- who is served

    def cursor(self, selection: tuple[PageRuns, ...], nbytes: int) -> Cursor:
        if not selection:
            raise SelectionError("this transfer is paged: name the pages")
        for pages in selection:
            if pages.group >= len(self._view.groups):
                raise SelectionError(f"group: {len(self._view.groups)} here, {pages.group} asked for")
        selected = [(pages.group, pages.runs) for pages in selection]
        cursor = PagedCursor(_data_plane.PagedCursor(page_layout(self._view), self.tables, selected))
        if cursor.lanes.nbytes != nbytes:
            raise SelectionError(
                f"nbytes: the selected pages hold {cursor.lanes.nbytes} here, {nbytes} asked for"
            )
        self._selection = selection
        return cursor

    def token_pages(self) -> TokenPages:
        return TokenPages(self._view, self.tables, self._padding_page, self.converted)

    def served_segments(self) -> Segments:
        """Local memory of the last subscription's pages in window order, for an audit."""
        chosen = {}
        for pages in self._selection:
            table = self.tables.page_ids(pages.group, 0, self.tables.length(pages.group))
            chosen[pages.group] = table[page_indices(pages.runs)]
        return window_segments(self._view, chosen)


class PagedCursor:
    """``lanes``: the same for a backend that knows pages; it is either theirs or read here, never both."""

    def __init__(self, lanes: _data_plane.PagedCursor) -> None:
        self.lanes = lanes

    @property
    def exhausted(self) -> bool:
        return self.lanes.exhausted

    def take_ready(self) -> Descriptors | None:
        ready = self.lanes.take_ready()
        if self.lanes.status != Status.OK:
            raise SelectionError(self.lanes.why, refusal_code(self.lanes.status))
        return ready


def refusal_code(status: int) -> Code:
    """Why pages were refused, of the status that a cursor or its post ended with."""
    return Code.TOKENS if status == Status.BEYOND_END else Code.BAD_SELECTION
