# SPDX-License-Identifier: Apache-2.0
"""Where a consumer's bytes go: pages of its cache, or plain memory.

A target is the whole request in one form. What travels (``selection``), what the backend fills
(``segments``) and what a conversion needs (``tokens``, ``pages_of``) are derived from it, when they are needed.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np

from sage_kv_connector.backends.base import Backend, Segments
from sage_kv_connector.backends.paged_backend import PagedBackend
from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.engine.pages.layout import PageIds, joined_segments, page_layout
from sage_kv_connector.engine.session.transfer_messages import PageRuns, Runs


class GroupPages(NamedTuple):
    """Pages of one kv group to fill, and the tokens of the request that they are wanted for.

    ``runs``: their places in the request; ``ids``: int64 (n,), the page ids here, in the same order.
    """

    group: int
    runs: Runs
    ids: PageIds
    tokens: range

    @property
    def is_one_run(self) -> bool:
        return len(self.runs) == 1


class PagesTarget(NamedTuple):
    """Pages of ``view``, none of the groups empty."""

    view: KVCacheView
    groups: tuple[GroupPages, ...]

    @property
    def selection(self) -> tuple[PageRuns, ...]:
        return tuple(PageRuns(pages.group, pages.runs) for pages in self.groups)

    @property
    def nbytes(self) -> int:
        page_bytes = page_layout(self.view).page_bytes
        return sum(len(pages.ids) * page_bytes[pages.group] for pages in self.groups)

    def segments(self) -> Segments:
        """Shape (n, 2), in the order of the window."""
        return window_segments(self.view, {pages.group: pages.ids for pages in self.groups})

    @property
    def has_tokens(self) -> bool:
        """Whether the pages of each group follow each other, so that tokens say the same."""
        return all(pages.is_one_run for pages in self.groups)

    def page_tokens(self, pages: GroupPages) -> range:
        """All that the pages have room for; of a target that ``has_tokens``."""
        size, first = self.view.groups[pages.group].page_size, pages.runs[0][0]
        return range(first * size, (first + len(pages.ids)) * size)

    def pages_of(self, group: int, first_token: int, tokens: int) -> list[int]:
        """Page ids that hold these tokens; of a target that ``has_tokens``."""
        size = self.view.groups[group].page_size
        pages = next(pages for pages in self.groups if pages.group == group)
        origin = pages.runs[0][0]
        first, end = first_token // size, -(-(first_token + tokens) // size)
        found: list[int] = pages.ids[first - origin : end - origin].tolist()
        return found


class MemoryTarget(NamedTuple):
    """Plain memory. ``items``: which of the producer's items it is for, all of them if empty."""

    memory: Segments
    items: Runs = ()

    @property
    def selection(self) -> tuple[PageRuns, ...]:
        return (PageRuns(0, self.items),) if self.items else ()

    @property
    def nbytes(self) -> int:
        return int(self.memory[:, 1].sum())

    def segments(self) -> Segments:
        return self.memory


Target = PagesTarget | MemoryTarget


def open_window(backend: Backend, connection: int, target: Target, generation: int) -> int:
    """Let the peer of ``connection`` fill the target. Raises OSError or ValueError as the backend does."""
    if isinstance(target, PagesTarget) and backend.capabilities.pages:
        pages = [(one.group, one.ids) for one in target.groups]
        return cast(PagedBackend, backend).open_paged_window(
            connection, page_layout(target.view), pages, generation
        )
    return backend.open_window(connection, target.segments(), generation)


def window_segments(view: KVCacheView, pages: dict[int, PageIds]) -> Segments:
    """Segments of local page ids by group, in window order; shape (n, 2)."""
    return joined_segments(
        [
            layer.page_segments(pages[index])
            for index, group in enumerate(view.groups)
            if index in pages and len(pages[index])
            for layer in group.layers
        ]
    )


def one_run(group: int, first: int, ids: PageIds, tokens: range) -> GroupPages:
    """Pages that follow each other from place ``first`` on."""
    return GroupPages(group, ((first, len(ids)),), np.asarray(ids, dtype=np.int64), tokens)
