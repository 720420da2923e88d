# SPDX-License-Identifier: Apache-2.0
"""The decode side of a converting transfer: windows over staging memory, decoded into pages.

A transfer is cut into parts (wire_plan). Each part: staging lease → window + SubscribePart
→ WINDOW_DONE → decode job → lease given back. As many parts are under way as staging
memory has room for, so that encoding there, the wire and decoding here overlap. The first
part that fails ends the transfer. After ``close`` returns nothing writes into the pages any
more. Control thread only.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sage_kv_connector.backends.base import Event, EventKind, Status
from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.conversion.jobs import Conversions
from sage_kv_connector.engine.conversion.staging import Lease
from sage_kv_connector.engine.conversion.wire_plan import (
    Part,
    TokenRange,
    WirePlan,
    plan_parts,
    plan_wire,
)
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.table import Session
from sage_kv_connector.format.converter import Span

#: Part of the staging memory that one part may take, so that several are under way.
PARTS_IN_STAGING = 16
SMALLEST_PART_BYTES = 256 << 10
LARGEST_PART_BYTES = 4 << 20


class PagesWanted(NamedTuple):
    """What a converting transfer fills: tokens by group, and the pages that hold them.

    ``pages[group]`` are page ids from that of the first token on. ``readers``: consumers that
    read this transfer from the same producer.
    """

    view: KVCacheView
    tokens: dict[int, TokenRange]
    pages: dict[int, Sequence[int]]
    readers: int = 1

    def pages_of(self, part: Part) -> list[int]:
        """Page ids that hold the part's tokens."""
        size = self.view.groups[part.group].page_size
        origin = self.tokens[part.group].first // size
        first, end = part.first_token // size, -(-(part.first_token + part.tokens) // size)
        return [int(page) for page in self.pages[part.group][first - origin : end - origin]]


class _PartUnderWay:
    __slots__ = ("generation", "job", "lease", "part", "window")

    def __init__(self, part: Part, lease: Lease) -> None:
        self.part, self.lease = part, lease
        self.generation = secrets.randbits(63) | 1
        self.window = 0
        self.job = 0


class PartFetch:
    """One transfer from one producer. ``on_done(error)`` comes once, "" if every part was decoded.

    Construction raises ValueError when the transfer can't be planned.
    """

    def __init__(
        self,
        session: Session,
        ours: KVCacheSchema,
        transfer_id: str,
        wanted: PagesWanted,
        target_dtype: str,
        conversions: Conversions,
        deadline: float,
        finished: bool,
        checksum: bool,
        on_done: Callable[[str], None],
    ) -> None:
        assert session.peer is not None and session.peer.schema is not None and session.plan is not None
        self._session = session
        self._ours, self._theirs = ours, session.peer.schema
        self._transfer_id = transfer_id
        self._wanted = wanted
        self._conversions = conversions
        self._deadline = deadline
        self._finished = finished
        self._checksum = checksum
        self._on_done: Callable[[str], None] | None = on_done
        self.reader = secrets.randbits(63) | 1
        self.plan: WirePlan = plan_wire(ours, self._theirs, target_dtype)
        part_bytes = conversions.incoming.capacity // PARTS_IN_STAGING
        part_bytes = min(max(part_bytes, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)
        self._waiting = plan_parts(self.plan, ours, wanted.tokens, part_bytes)
        if not self._waiting:
            raise ValueError("the peer holds none of the layers and heads that are wanted")
        self.parts = tuple(self._waiting)
        self.nbytes = sum(part.nbytes for part in self.parts)
        self._waiting.reverse()
        self._left = len(self._waiting)
        self._lease: Lease | None = None
        self._under_way: dict[int, _PartUnderWay] = {}  # by window
        self._by_generation: dict[int, _PartUnderWay] = {}
        self.landed_at = 0.0
        self._filling = False

    def start(self) -> None:
        self._fill()

    def owns(self, generation: int) -> bool:
        return generation in self._by_generation

    def on_window(self, event: Event) -> None:
        """WINDOW_DONE and WINDOW_FAILED of this session."""
        under_way = self._under_way.get(event.id)
        if under_way is None or self._on_done is None:
            return
        if event.kind == EventKind.WINDOW_FAILED:
            status = Status(event.status).name.lower()
            detail = f": {event.detail}" if event.detail else ""
            self._end(f"{status} in a part of group {under_way.part.group}{detail}")
            return
        self.landed_at = max(self.landed_at, event.time_ns / 1e9)
        self._close_window(under_way)
        try:
            self._decode(under_way)
        except ValueError as error:
            self._end(str(error))

    def close(self) -> None:
        """Stop: windows closed, jobs ended, memory given back. Idempotent."""
        self._on_done = None
        self._waiting.clear()
        if self._lease is not None:
            self._conversions.incoming.release(self._lease)
        for under_way in list(self._by_generation.values()):
            if under_way.window:
                self._close_window(under_way)
            if under_way.job:
                self._conversions.cancel(under_way.job)
            self._conversions.incoming.release(under_way.lease)
        self._by_generation.clear()

    # -- inside

    def _fill(self) -> None:
        """Ask for staging memory for the next part while there is one; a loop, not a recursion."""
        if self._filling:
            return
        self._filling = True
        while self._waiting and (self._lease is None or self._lease.address):
            self._lease = None
            lease = self._conversions.incoming.request(self._waiting[-1].nbytes, self._ready)
            if self._on_done is None:
                self._conversions.incoming.release(lease)
                break
            self._lease = lease
        self._filling = False

    def _ready(self, lease: Lease) -> None:
        if self._on_done is None:
            self._conversions.incoming.release(lease)
            return
        part = self._waiting.pop()
        under_way = _PartUnderWay(part, lease)
        self._by_generation[under_way.generation] = under_way
        session = self._session
        segments = np.array([[lease.address, part.nbytes]], dtype=np.uint64)
        try:
            window = session.backend.open_window(session.connection, segments, under_way.generation)
        except (OSError, ValueError) as error:
            self._end(str(error))
            return
        under_way.window = window
        self._under_way[window] = under_way
        session.send(
            m.SubscribePart(
                transfer_id=self._transfer_id,
                generation=under_way.generation,
                window=session.backend.window_descriptor(window),
                nbytes=part.nbytes,
                group=part.group,
                first_layer=part.run.peer,
                layers=part.run.layers,
                first_head=self.plan.first_head,
                heads=self.plan.heads,
                first_token=part.first_token,
                tokens=part.tokens,
                formats=self.plan.formats[part.group],
                reader=self.reader,
                readers=self._wanted.readers,
                last=not self._waiting,
                checksum=self._checksum,
                finished=self._finished,
                timeout_ms=max(1, int((self._deadline - time.monotonic()) * 1000)),
            )
        )
        self._fill()

    def _decode(self, under_way: _PartUnderWay) -> None:
        part = under_way.part
        view, formats = self._wanted.view.groups[part.group], self.plan.formats[part.group]
        converter = self._session.converter(
            (id(view), part.group, formats, "read"),
            lambda: self._conversions.group(view, part.group, formats, self._ours, self._ours, self._theirs),
        )
        span = Span(
            part.run.local,
            part.run.layers,
            self.plan.first_head - self._ours.head_start,
            self.plan.heads,
            part.first_token,
            part.tokens,
            self._wanted.pages_of(part),
        )
        under_way.job = self._conversions.decode(
            converter,
            span,
            under_way.lease.address,
            part.nbytes,
            lambda error: self._decoded(under_way, error),
        )

    def _decoded(self, under_way: _PartUnderWay, error: str) -> None:
        if self._on_done is None:
            return
        under_way.job = 0
        self._by_generation.pop(under_way.generation, None)
        self._conversions.incoming.release(under_way.lease)
        self._left -= 1
        if error:
            self._end(error)
        elif self._left == 0:
            self._end("")
        else:
            self._fill()

    def _close_window(self, under_way: _PartUnderWay) -> None:
        self._under_way.pop(under_way.window, None)
        self._session.backend.close_window(under_way.window)
        under_way.window = 0

    def _end(self, error: str) -> None:
        done = self._on_done
        self.close()
        if done is not None:
            done(error)
