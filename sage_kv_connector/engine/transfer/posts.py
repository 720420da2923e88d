# SPDX-License-Identifier: Apache-2.0
"""Posts under way of all streams that an engine serves, and how long there were any. Control thread only."""

from __future__ import annotations

import time
from collections.abc import Callable

from sage_kv_connector.backends.base import Event
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer.offer import Offer, Stream


class Posts:
    """Of one engine."""

    def __init__(self) -> None:
        self._posts: dict[tuple[int, int], tuple[Offer, Stream]] = {}
        self._since = 0
        self.posting_ns = 0  #: time with at least one post under way

    def begin(self, offer: Offer, stream: Stream, post: Callable[..., int]) -> None:
        """Call ``post``, of the stream's backend, with what is to be said of the stream.

        Raises OSError or ValueError as the backend does.
        """
        request, session = stream.request, stream.session
        number = post(
            connection=session.connection,
            window_descriptor=stream.window,
            generation=request.generation,
            checksum=request.checksum or bool(session.plan and session.plan.checksum),
        )
        stream.posts.add(number)
        stream.posted = True
        if not self._posts:
            self._since = time.monotonic_ns()
        self._posts[(id(session.backend), number)] = (offer, stream)

    def end(self, session: Session, event: Event) -> tuple[Offer, Stream] | None:
        """Whose post a SENT event is of; None for one that is not known (any more)."""
        known = self._posts.pop((id(session.backend), event.id), None)
        if known is None:
            return None
        if not self._posts:
            self.posting_ns += time.monotonic_ns() - self._since
        known[1].posts.discard(event.id)
        return known
