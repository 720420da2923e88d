# SPDX-License-Identifier: Apache-2.0
"""Where a producer's bytes come from: what a transfer id stands for, and the ways through it.

Memory model: a source knows addresses of this process and hands them out as descriptors (address, offset in
the consumer's window, length). A window is linear: group after group, in a group layer after layer, in a
layer the selected pages in ascending order, in a page its planes; a consumer lays its segments out in the
same order (``target.py``).

Life: the engine offers a source and changes it while prefill goes on (``paged.py``) → each subscription
gets a cursor, each part of a converting one a part cursor → these are asked again after every change.

Implementor's contract: a cursor hands out each byte once, only when it is final, and raises SelectionError,
never anything else, for what a peer should not have asked for. Control thread only.
"""

from __future__ import annotations

from typing import Protocol

from sage_kv_connector.backends.base import Descriptors
from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.engine.session.transfer_messages import PageRuns, SubscribePart


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


class PartCursor(Protocol):
    """A converting part's way through a source."""

    @property
    def group(self) -> GroupView: ...

    def ready_pages(self) -> list[int] | None:
        """Page ids of the part's tokens once all of them are final; None until then.

        Raises SelectionError when they turn out to have no memory.
        """
        ...


class Source(Protocol):
    """What a transfer id stands for on the producer."""

    def cursor(self, selection: tuple[PageRuns, ...], nbytes: int) -> Cursor:
        """Begin to serve a subscription. Raises SelectionError."""
        ...

    def part(self, request: SubscribePart) -> PartCursor:
        """Begin to serve a converting part. Raises SelectionError."""
        ...
