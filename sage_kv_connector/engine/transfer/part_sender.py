# SPDX-License-Identifier: Apache-2.0
"""The prefill side of a converting transfer: when it may begin, and with which staging memory.

The data plane waits for pages, encodes and sends (``csrc/parts``). Life: made → the first pages are final, which the
consumer is told unless it knows → it grants room → a ring of staging memory → one post → ``close``. Neither side
holds a ring while there is nothing to send. ``close`` may come at any time; after it no page is read and no callback
comes. Control thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.backends.converting_backend import ConvertingBackend, Ring
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.conversion.jobs import PoolEvent
from sage_kv_connector.engine.conversion.part_plan import Parts, Wanted, plan_parts
from sage_kv_connector.engine.conversion.staging import Lease, ring_of
from sage_kv_connector.engine.pages.layout import page_layout
from sage_kv_connector.engine.pages.paged import PagedCursor, refusal_code
from sage_kv_connector.engine.pages.source import Converted, Cursor, SelectionError, Source, TokenPages
from sage_kv_connector.engine.session.session import Session, owner_of
from sage_kv_connector.engine.session.transfer_messages import PartsReady, SubscribeParts


class PartSender:
    """``post`` is called at most once, with what begins the post.

    Raises SelectionError, naming the field, for what does not fit this cache.
    """

    def __init__(
        self,
        request: SubscribeParts,
        pages: TokenPages,
        session: Session,
        converters: Converters,
        post: Callable[[Callable[..., int]], None],
        on_failed: Callable[[Reason], None],
    ) -> None:
        self._request = request
        self._session = session
        self._conversions = converters.conversions
        self._post, self._on_failed = post, on_failed
        first = first_head_of(request, converters)
        parts = parts_of(request, pages)
        groups = {
            one.group: converters.to_wire(session, pages.view.groups[one.group], one.group, one.formats)
            for one in request.groups
        }
        self._encoder = _data_plane.PartEncoder(
            self._conversions.pool,
            parts,
            (first, request.heads),
            [group.page_size for group in pages.view.groups],
            self._conversions.in_lanes(groups),
            pages.tables,
            request.prompt.tokens,
            pages.padding_page,
        )
        if self._encoder.nbytes != request.nbytes:
            raise SelectionError(
                f"nbytes: the parts hold {self._encoder.nbytes} here, {request.nbytes} asked for"
            )
        pages.converted.append(Converted(parts, request.first_head, request.heads))
        self._coder = self._conversions.code(self._encoder, groups, self._on_event)
        self._ready = False
        self._granted = False
        self._lease: Lease | None = None

    def start(self) -> None:
        self._encoder.attach()

    def granted(self, parts: int) -> None:
        """The consumer has a window, and room for the first ``parts``; lanes hear of more."""
        self._granted = True
        self._encoder.grant(parts)
        self._go_on()

    def close(self) -> None:
        self._coder.close()
        if self._lease is not None:
            self._conversions.outgoing.release(self._lease)

    # -- inside

    def _on_event(self, event: Event) -> None:
        if event.kind != PoolEvent.PARTS_READY:
            return
        if event.status != Status.OK:
            self._on_failed(Reason(refusal_code(event.status), event.why))
            return
        self._ready = True
        if not self._request.finished:
            self._session.send(PartsReady(self._request.generation))
        self._go_on()

    def _go_on(self) -> None:
        if not self._ready or not self._granted or self._lease is not None:
            return
        outgoing = self._conversions.outgoing
        finished = self._request.finished
        peer = owner_of(self._session)
        ring = ring_of(outgoing, self._encoder.largest, self._encoder.count, finished=finished)
        try:
            self._lease = outgoing.request(ring.nbytes, lambda lease: self._placed(lease, ring), peer)
        except ValueError as error:
            self._on_failed(Reason(Code.MEMORY, str(error)))

    def _placed(self, lease: Lease, ring: Ring) -> None:
        self._lease = lease
        backend = cast(ConvertingBackend, self._session.backend)
        here = ring._replace(address=lease.address)
        self._post(partial(backend.post_parts, encoder=self._encoder, ring=here))


def part_sender(
    request: SubscribeParts,
    source: Source,
    session: Session,
    converters: Converters | None,
    post: Callable[[Callable[..., int]], None],
    on_failed: Callable[[Reason], None],
) -> PartSender:
    """As ``PartSender``; raises SelectionError as well where nothing can be converted."""
    if converters is None or session.peer is None or session.peer.schema is None:
        raise SelectionError("no schema describes this cache: it can't be converted")
    if not session.backend.capabilities.parts:
        raise SelectionError(f"backend {session.backend.capabilities.name} does not convert")
    return PartSender(request, source.token_pages(), session, converters, post, on_failed)


def read_cursor(
    request: SubscribeParts, source: Source, session: Session, converters: Converters | None
) -> Cursor:
    """The pages of a box whose consumer reads them in place. Raises SelectionError as ``part_sender``."""
    if converters is None:
        raise SelectionError("no schema describes this cache: its pages can't be told apart")
    if not session.backend.capabilities.device_memory:
        raise SelectionError(f"window: nobody reads pages in place over {session.backend.capabilities.name}")
    first_head_of(request, converters)
    pages = source.token_pages()
    parts = parts_of(request, pages)
    selection = []
    for one in request.groups:
        size = pages.view.groups[one.group].page_size
        first = one.first_token // size
        selection.append((one.group, ((first, -(-(one.first_token + one.tokens) // size) - first),)))
    padding = None
    if pages.padding_page is not None:
        needed = [-(-request.prompt.tokens // group.page_size) for group in pages.view.groups]
        padding = (pages.padding_page, needed)
    cursor = _data_plane.PagedCursor(page_layout(pages.view), pages.tables, selection, padding)
    if cursor.nbytes != request.nbytes:
        raise SelectionError(f"nbytes: the pages hold {cursor.nbytes} here, {request.nbytes} asked for")
    pages.converted.append(Converted(parts, request.first_head, request.heads))
    return PagedCursor(cursor)


def first_head_of(request: SubscribeParts, converters: Converters) -> int:
    """Of what is asked for, by its place here. Raises SelectionError for heads that are not here."""
    ours = converters.schema
    first = request.first_head - ours.head_start
    if first < 0 or first + request.heads > ours.head_count:
        raise SelectionError(
            f"heads: {ours.head_start} to {ours.head_end - 1} here, {request.first_head} to "
            f"{request.first_head + request.heads - 1} asked for"
        )
    return first


def parts_of(request: SubscribeParts, pages: TokenPages) -> Parts:
    """What a consumer's box is cut into. Raises ValueError naming the field for what does not fit this cache."""
    groups = pages.view.groups
    wanted = []
    for one in request.groups:
        if one.group >= len(groups):
            raise SelectionError(f"group: {len(groups)} here, {one.group} asked for")
        group = groups[one.group]
        last = max(first + count for first, count in one.runs)
        if last > len(group.layers):
            raise SelectionError(f"layers: {len(group.layers)} here, up to {last} asked for")
        if len(one.formats) != len(group.canonical):
            raise SelectionError(f"formats: {len(group.canonical)} planes here, {len(one.formats)} asked for")
        if not one.formats and (one.first_token % group.page_size or one.tokens % group.page_size):
            raise SelectionError(
                f"tokens: {one.first_token}, +{one.tokens} asked for of group {one.group}, whose pages of "
                f"{group.page_size} tokens go whole"
            )
        tokens = range(one.first_token, one.first_token + one.tokens)
        dims = [plane.dim for plane in group.canonical]
        wanted.append(
            Wanted(
                one.group, one.runs, tokens, one.formats, dims, group.page_size, group.layers[0].page_bytes
            )
        )
    return plan_parts(wanted, request.heads, request.part_bytes)
