# SPDX-License-Identifier: Apache-2.0
"""Where a producer's bytes come from: what a transfer id stands for, and the ways through it.

Memory model: a source knows addresses of this process and hands them out as descriptors (address, offset in
the consumer's window, length). A window is linear: group after group, in a group layer after layer, in a
layer the selected pages in ascending order, in a page its planes; a consumer lays its segments out in the
same order (``target.py``).

Life: the engine offers a source and changes it while prefill goes on (``paged.py``) → each subscription
gets a cursor, or the pages of its tokens if it converts → lanes see every change, other cursors are asked again.

Implementor's contract: a cursor hands out each byte once, only when it is final, and raises SelectionError,
never anything else, for what a peer should not have asked for. Control thread only.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Descriptors
from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.engine.session.transfer_messages import PageRuns


class SelectionError(ValueError):
    """A subscription asks for something that this source does not have."""

    def __init__(self, detail: str, code: Code = Code.BAD_SELECTION) -> None:
        super().__init__(detail)
        self.reason = Reason(code, detail)


def refusal(error: ValueError) -> Reason:
    """Why a selection is refused, of what a source or a view raised."""
    return error.reason if isinstance(error, SelectionError) else Reason(Code.BAD_SELECTION, str(error))


class Cursor(Protocol):
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


class Converted(NamedTuple):
    """What was asked for in parts: ``parts`` as ``part_plan.Parts``, heads of the whole model."""

    parts: npt.NDArray[np.int64]
    first_head: int
    heads: int


class TokenPages(NamedTuple):
    """Pages that hold a request's tokens, for who converts them.

    ``padding_page``: stands for those behind the last one; without one they are refused. ``converted``: gets what is
    served.
    """

    view: KVCacheView
    tables: _data_plane.PageTables
    padding_page: int | None
    converted: list[Converted]

    def pages_of(self, group: int, first_token: int, tokens: int) -> list[int]:
        """Page ids of these tokens, of a request that ended."""
        size, last = self.view.groups[group].page_size, self.tables.last(group)
        first, end = first_token // size, -(-(first_token + tokens) // size)
        found: list[int] = self.tables.page_ids(
            group, first, end if last is None else min(end, last)
        ).tolist()
        return found + [self.padding_page or 0] * (end - first - len(found))


class Source(Protocol):
    """What a transfer id stands for on the producer."""

    def cursor(self, selection: tuple[PageRuns, ...], nbytes: int) -> Cursor:
        """Begin to serve a subscription. Raises SelectionError."""
        ...

    def token_pages(self) -> TokenPages:
        """For a converting transfer. Raises SelectionError for what has no tokens."""
        ...
