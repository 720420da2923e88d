# SPDX-License-Identifier: Apache-2.0
"""The decode side of a converting transfer: one window over a ring of staging memory, decoded into pages.

A transfer is cut into parts (part_plan); the data plane takes them in, decodes them and moves the window on
(``csrc/parts``). Here are the orders: subscribe → the producer has something to send, or prefill is known to be over →
a ring → the window and the first grant, lanes give the others → done. The ring is taken no earlier, so
that who waits for a prefill keeps nobody from staging memory. After ``close`` returns nothing writes into the pages
any more. Control thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Event, EventKind, Status
from sage_kv_connector.backends.converting_backend import ConvertingBackend, Ring
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.conversion.jobs import PoolEvent
from sage_kv_connector.engine.conversion.staging import Lease, part_bytes_of, ring_of
from sage_kv_connector.engine.conversion.wire_plan import plan_wire
from sage_kv_connector.engine.pages.target import PagesTarget
from sage_kv_connector.engine.session.session import Session, owner_of
from sage_kv_connector.engine.session.transfer_messages import Grant
from sage_kv_connector.engine.transfer.subscription import Subscription
from sage_kv_connector.engine.transfer.wanted_box import wanted_box
from sage_kv_connector.engine.transfer.windows import Windows, failure


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
        self._backend = cast(ConvertingBackend, session.backend)
        self._conversions = converters.conversions
        self._windows = windows
        self._checksum = checksum
        self._on_done: Callable[[Reason | None], None] | None = on_done
        ours = converters.schema
        plan = self.plan = plan_wire(ours, session.peer.schema, target_dtype)
        box = self._box = wanted_box(ours, target, plan, part_bytes_of(self._conversions.incoming))
        parts, asked = box.parts, box.asked
        self.converted = box.converted
        views = target.view.groups
        groups = {
            one.group: converters.from_wire(session, views[one.group], one.group, one.formats)
            for one in asked
        }
        self._decoder = _data_plane.PartDecoder(
            self._conversions.pool,
            parts,
            (plan.first_head - ours.head_start, plan.heads),
            [group.page_size for group in views],
            self._conversions.in_lanes(groups),
            [(pages.group, pages.runs[0][0], pages.ids) for pages in target.groups],
        )
        self.nbytes = self._decoder.nbytes
        self._coder = self._conversions.code(self._decoder, groups, self._on_part_event)
        self._lease: Lease | None = None
        self._window = 0
        self.landed = False  #: all bytes are here: nothing more is needed of the producer

    def start(self) -> None:
        """Subscribe. Where prefill is over, everything is there: room for it is granted at once."""
        self._windows.own(self._subscription.generation, self._subscription)
        self._session.send(self._box.message(self._subscription, self.nbytes, self._checksum))
        if self._subscription.wanted.finished:
            self.ready()

    def ready(self) -> None:
        """The producer has something to send: have it sent once there is staging memory."""
        if self._lease is not None or self._on_done is None:
            return
        incoming = self._conversions.incoming
        finished = self._subscription.wanted.finished
        peer = owner_of(self._session)
        ring = ring_of(incoming, self._decoder.largest, self._decoder.count, finished=finished)
        try:
            self._lease = incoming.request(ring.nbytes, lambda lease: self._placed(lease, ring), peer)
        except ValueError as error:
            self._end(Reason(Code.MEMORY, str(error)))

    def close(self) -> int:
        """Stop: window closed, conversions ended, memory given back. Returns what landed, in bytes. Idempotent."""
        if self._on_done is None:
            return 0
        self._on_done = None
        landed = self._windows.close(self._session, self._window) if self._window else 0
        self._coder.close()
        self._windows.forget(self._subscription.generation)
        if self._lease is not None:
            self._conversions.incoming.release(self._lease)
        return landed

    # -- inside

    def _placed(self, lease: Lease, ring: Ring) -> None:
        self._lease = lease
        session, generation = self._session, self._subscription.generation
        try:
            self._window = self._backend.open_part_window(
                session.connection, self._decoder, ring._replace(address=lease.address), generation
            )
        except ConnectionError:
            return  # the session says so a moment later
        except (OSError, ValueError) as error:
            self._end(Reason(Code.MEMORY, str(error)))
            return
        self._windows.opened(session, self._window, self._on_window)
        window = session.backend.window_descriptor(self._window)
        session.send(Grant(generation, self._decoder.granted, window))

    def _on_window(self, event: Event) -> None:
        """That bytes landed is not the end yet."""
        if event.kind == EventKind.WINDOW_FAILED:
            self._end(failure(event, f"in a part of {self._decoder.count}"))
        else:
            self.landed = True

    def _on_part_event(self, event: Event) -> None:
        if event.kind == PoolEvent.PARTS_DONE:
            # By itself: that the window is full may be told later than that its last part is decoded.
            self._subscription.moved(event.began_ns, event.offset)
            self._end(None if event.status == Status.OK else Reason(Code.CONVERSION, event.why))

    def _end(self, reason: Reason | None) -> None:
        done = self._on_done
        self.close()
        if done is not None:
            done(reason)
