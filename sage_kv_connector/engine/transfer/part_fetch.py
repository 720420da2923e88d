# SPDX-License-Identifier: Apache-2.0
"""The decode side of a converting transfer: windows over staging memory, decoded into pages.

A transfer is cut into parts (wire_plan). Each part: staging lease → window + SubscribePart
→ WINDOW_DONE → decode job → lease given back. As many parts are under way as staging
memory has room for, so that encoding there, the wire and decoding here overlap. The first
part that fails ends the transfer. After ``close`` returns nothing writes into the pages any
more. Control thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from sage_kv_connector.backends.base import Event, EventKind
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.conversion.staging import Lease
from sage_kv_connector.engine.conversion.wire_plan import Part, WirePlan, plan_parts, plan_wire
from sage_kv_connector.engine.pages.target import MemoryTarget, PagesTarget
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.session.transfer_messages import SubscribePart
from sage_kv_connector.engine.transfer.subscription import Subscription
from sage_kv_connector.engine.transfer.windows import Windows, failure, new_number
from sage_kv_connector.format.converter import Span

#: Part of the staging memory that one part may take, so that several are under way.
PARTS_IN_STAGING = 16
SMALLEST_PART_BYTES = 256 << 10
LARGEST_PART_BYTES = 4 << 20


class _PartUnderWay:
    __slots__ = ("generation", "job", "lease", "part", "window")

    def __init__(self, part: Part, lease: Lease) -> None:
        self.part, self.lease = part, lease
        self.generation = new_number()
        self.window = 0
        self.job = 0


class PartFetch:
    """One transfer from one producer. ``on_done(reason)`` comes once, with None if every part was decoded.

    Construction raises ValueError when the transfer can't be planned.
    """

    def __init__(
        self,
        subscription: Subscription,
        session: Session,
        target: PagesTarget,
        target_dtype: str,
        converters: Converters,
        windows: Windows,
        checksum: bool,
        on_done: Callable[[Reason | None], None],
    ) -> None:
        assert session.peer is not None and session.peer.schema is not None
        self._subscription = subscription
        self._session = session
        self._target = target
        self._converters = converters
        self._conversions = converters.conversions
        self._windows = windows
        self._checksum = checksum
        self._on_done: Callable[[Reason | None], None] | None = on_done
        self.plan: WirePlan = plan_wire(converters.schema, session.peer.schema, target_dtype)
        part_bytes = self._conversions.incoming.capacity // PARTS_IN_STAGING
        part_bytes = min(max(part_bytes, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)
        self._waiting = plan_parts(self.plan, converters.schema, target.tokens, part_bytes)
        if not self._waiting:
            raise ValueError("the peer holds none of the layers and heads that are wanted")
        self.parts = tuple(self._waiting)
        self.nbytes = sum(part.nbytes for part in self.parts)
        self._waiting.reverse()
        self._left = len(self._waiting)
        self._lease: Lease | None = None
        self._under_way: set[_PartUnderWay] = set()
        self._filling = False

    def start(self) -> None:
        self._fill()

    def close(self) -> None:
        """Stop: windows closed, jobs ended, memory given back. Idempotent."""
        self._on_done = None
        self._waiting.clear()
        if self._lease is not None:
            self._conversions.incoming.release(self._lease)
        for under_way in list(self._under_way):
            if under_way.window:
                self._close_window(under_way)
            if under_way.job:
                self._conversions.cancel(under_way.job)
            self._forget(under_way)

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
        self._under_way.add(under_way)
        session, wanted = self._session, self._subscription.wanted
        staging = MemoryTarget(np.array([[lease.address, part.nbytes]], dtype=np.uint64))
        receiver = partial(self._on_event, under_way)
        try:
            under_way.window = self._windows.open(
                session, staging, under_way.generation, self._subscription, receiver
            )
        except (OSError, ValueError) as error:
            self._end(Reason(Code.MEMORY, str(error)))
            return
        left_s = self._subscription.asked_at + wanted.deadline_s - time.monotonic()
        session.send(
            SubscribePart(
                transfer_id=wanted.transfer_id,
                generation=under_way.generation,
                window=session.backend.window_descriptor(under_way.window),
                nbytes=part.nbytes,
                group=part.group,
                first_layer=part.run.peer,
                layers=part.run.layers,
                first_head=self.plan.first_head,
                heads=self.plan.heads,
                first_token=part.first_token,
                tokens=part.tokens,
                formats=self.plan.formats[part.group],
                consumer=self._subscription.consumer,
                consumers=wanted.consumers,
                last=not self._waiting,
                checksum=self._checksum,
                finished=wanted.finished,
                timeout_ms=max(1, int(left_s * 1000)),
                prompt=wanted.prompt,
            )
        )
        self._fill()

    def _on_event(self, under_way: _PartUnderWay, event: Event) -> None:
        """WINDOW_DONE and WINDOW_FAILED of a part's window."""
        if self._on_done is None:
            return
        if event.kind == EventKind.WINDOW_FAILED:
            self._end(failure(event, f"in a part of group {under_way.part.group}"))
            return
        self._close_window(under_way)
        try:
            self._decode(under_way)
        except ValueError as error:
            self._end(Reason(Code.CONVERSION, str(error)))

    def _decode(self, under_way: _PartUnderWay) -> None:
        part, plan = under_way.part, self.plan
        view = self._target.view.groups[part.group]
        converter = self._converters.from_wire(self._session, view, part.group, plan.formats[part.group])
        span = Span(
            part.run.local,
            part.run.layers,
            plan.first_head - self._converters.schema.head_start,
            plan.heads,
            part.first_token,
            part.tokens,
            self._target.pages_of(part.group, part.first_token, part.tokens),
        )
        under_way.job = self._conversions.decode(
            converter,
            span,
            under_way.lease.address,
            part.nbytes,
            partial(self._decoded, under_way),
        )

    def _decoded(self, under_way: _PartUnderWay, error: str) -> None:
        if self._on_done is None:
            return
        under_way.job = 0
        self._forget(under_way)
        self._left -= 1
        if error:
            self._end(Reason(Code.CONVERSION, error))
        elif self._left == 0:
            self._end(None)
        else:
            self._fill()

    def _close_window(self, under_way: _PartUnderWay) -> None:
        self._windows.close(self._session, under_way.window)
        under_way.window = 0

    def _forget(self, under_way: _PartUnderWay) -> None:
        self._under_way.discard(under_way)
        self._windows.forget(under_way.generation)
        self._conversions.incoming.release(under_way.lease)

    def _end(self, reason: Reason | None) -> None:
        done = self._on_done
        self.close()
        if done is not None:
            done(reason)
