# SPDX-License-Identifier: Apache-2.0
"""How the bytes of streams are posted, which posts are under way, and how long there were any. Control thread only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import cast

from sage_kv_connector.backends.base import Event
from sage_kv_connector.backends.paged_backend import PagedBackend
from sage_kv_connector.contract.failure import Code, Reason, fault
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.pages.paged import PagedCursor
from sage_kv_connector.engine.pages.source import refusal
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer.offer import Offer, Stream
from sage_kv_connector.engine.transfer.part_sender import part_sender, read_cursor

logger = logging.getLogger(__name__)


class Posts:
    """Of one engine. ``on_broken(offer, stream, why)``: what this stream's consumer needs can't be sent."""

    def __init__(
        self, converters: Converters | None, on_broken: Callable[[Offer, Stream, Reason], None]
    ) -> None:
        self._converters = converters
        self._on_broken = on_broken
        self._posts: dict[tuple[int, int], tuple[Offer, Stream]] = {}
        self._since = 0
        self.posting_ns = 0  #: time with at least one post under way

    def prepare(self, offer: Offer, stream: Stream) -> None:
        """Find what is asked for. Raises ValueError for what can't be had."""
        request = stream.request
        if isinstance(request, m.SubscribeParts) and request.window:
            stream.cursor = read_cursor(request, offer.source, stream.session, self._converters)
        elif isinstance(request, m.SubscribeParts):
            ends = partial(self._post, offer, stream), partial(self._on_broken, offer, stream)
            stream.part = part_sender(request, offer.source, stream.session, self._converters, *ends)
        else:
            stream.cursor = offer.source.cursor(request.selection, request.nbytes)

    def start(self, offer: Offer, stream: Stream) -> None:
        """Send it, now and as it becomes ready."""
        backend, cursor = stream.session.backend, stream.cursor
        if stream.part is not None:
            stream.by_lanes = True
            stream.part.start()
        elif isinstance(cursor, PagedCursor) and backend.capabilities.pages:
            stream.by_lanes = True
            lanes = cast(PagedBackend, backend)
            self._post(offer, stream, partial(lanes.post_pages, cursor=cursor.lanes))
        else:
            self.pump(offer, stream)

    def pump(self, offer: Offer, stream: Stream) -> None:
        """Send what became ready of a stream that lanes don't serve by themselves."""
        assert stream.cursor is not None
        descriptors = stream.cursor.take_ready()
        if descriptors is not None:
            self._post(offer, stream, partial(stream.session.backend.post, descriptors=descriptors))

    def guarded(self, offer: Offer, stream: Stream, step: Callable[[Offer, Stream], None]) -> None:
        """A fault in one stream ends that one."""
        try:
            step(offer, stream)
        except ValueError as error:
            self._on_broken(offer, stream, refusal(error))
        except Exception as error:
            logger.debug("%s: transfer %s", stream.session.label, stream.transfer_id, exc_info=True)
            self._on_broken(offer, stream, fault(error))

    def end(self, session: Session, event: Event) -> tuple[Offer, Stream] | None:
        """Whose post a SENT event is of; None for one that is not known (any more)."""
        known = self._posts.pop((id(session.backend), event.id), None)
        if known is None:
            return None
        if not self._posts:
            self.posting_ns += time.monotonic_ns() - self._since
        known[1].posts.discard(event.id)
        return known

    def _post(self, offer: Offer, stream: Stream, post: Callable[..., int]) -> None:
        """Call ``post``, of the stream's backend, with what is to be said of the stream."""
        request, session = stream.request, stream.session
        try:
            number = post(
                connection=session.connection,
                window_descriptor=stream.window,
                generation=request.generation,
                checksum=request.checksum or bool(session.plan and session.plan.checksum),
            )
        except ConnectionError:
            return  # as on_sent: the session says so a moment later, and its consumer may come back
        except (OSError, ValueError) as error:
            self._on_broken(offer, stream, Reason(Code.POST, str(error)))
            return
        stream.posts.add(number)
        stream.posted = True
        if not self._posts:
            self._since = time.monotonic_ns()
        self._posts[(id(session.backend), number)] = (offer, stream)
