# SPDX-License-Identifier: Apache-2.0
"""One converted part on the prefill side: wait for its pages, take staging memory, encode, hand over.

Life: ``pump`` until the pages are ready → staging lease → encode job → ``on_encoded`` with
one descriptor → (the post ends) → ``close``. ``close`` may come at any time; after it no
page is read and no callback comes. Control thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from sage_kv_connector.backends.base import Descriptors
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.conversion.staging import Lease
from sage_kv_connector.engine.conversion.wire_plan import head_bytes
from sage_kv_connector.engine.pages.source import PartCursor, SelectionError
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.session.transfer_messages import SubscribePart
from sage_kv_connector.format.converter import Span


class PartSender:
    """Raises SelectionError, naming the field, for a part that does not fit this cache."""

    def __init__(
        self,
        request: SubscribePart,
        pages: PartCursor,
        session: Session,
        converters: Converters,
        on_encoded: Callable[[Descriptors], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self.posted = False
        self._request = request
        self._pages = pages
        self._conversions = converters.conversions
        self._on_encoded, self._on_failed = on_encoded, on_failed
        ours = converters.schema
        first = request.first_head - ours.head_start
        if first < 0 or first + request.heads > ours.head_count:
            raise SelectionError(
                f"heads: {ours.head_start} to {ours.head_end - 1} here, {request.first_head} to "
                f"{request.first_head + request.heads - 1} asked for"
            )
        self._converter = converters.to_wire(session, pages.group, request.group, request.formats)
        dims = [plane.dim for plane in pages.group.canonical]
        expected = head_bytes(request.formats, dims, request.first_token, request.tokens)
        expected *= request.layers * request.heads
        if expected != request.nbytes:
            raise SelectionError(f"nbytes: the part holds {expected} here, {request.nbytes} asked for")
        self._first_head = first
        self._lease: Lease | None = None
        self._job = 0
        self._begun = False
        self._closed = False

    def pump(self) -> None:
        """Begin once the pages are ready. Raises SelectionError when they have no memory."""
        if self._begun or self._closed:
            return
        pages = self._pages.ready_pages()
        if pages is None:
            return
        request = self._request
        span = Span(
            request.first_layer,
            request.layers,
            self._first_head,
            request.heads,
            request.first_token,
            request.tokens,
            pages,
        )

        self._begun = True
        self._lease = self._conversions.outgoing.request(request.nbytes, partial(self._encode, span))

    def close(self) -> None:
        self._closed = True
        if self._job:
            self._conversions.cancel(self._job)
        if self._lease is not None:
            self._conversions.outgoing.release(self._lease)

    def _encode(self, span: Span, lease: Lease) -> None:
        self._lease = lease
        try:
            self._job = self._conversions.encode(
                self._converter, span, lease.address, self._request.nbytes, self._encoded
            )
        except ValueError as error:
            self._on_failed(str(error))

    def _encoded(self, error: str) -> None:
        if self._closed or self._lease is None:
            return
        if error:
            self._on_failed(error)
            return
        self.posted = True
        self._on_encoded(np.array([[self._lease.address, 0, self._request.nbytes]], dtype=np.uint64))
