# SPDX-License-Identifier: Apache-2.0
"""The decode side: subscribe to a transfer, let its window fill, report how it ended.

Life of a subscription: ``subscribe`` → session → window + Subscribe message →
WINDOW_DONE | WINDOW_FAILED | Failed message | session lost | deadline | cancel.
Whatever happens, ``on_outcome`` is called exactly once, and by then the backend
writes nothing into the segments any more. Control thread only.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from sage_kv_connector.backends.base import Event, EventKind, Segments, Status
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.control.loop import ControlLoop, Timer
from sage_kv_connector.engine.conversion.jobs import Conversions
from sage_kv_connector.engine.conversion.wire_plan import needs_conversion
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.table import Session, SessionTable
from sage_kv_connector.engine.transfer.part_fetch import PagesWanted, PartFetch


class Wanted(NamedTuple):
    """What to fetch: ``segments`` is the memory for ``selection``, in the order of the window.

    ``paged``: the same by tokens, for a peer whose pages must be converted. ``readers``: so many
    consumers read this transfer from the same producer.
    """

    transfer_id: str
    selection: tuple[m.PageRuns, ...]
    segments: Segments
    finished: bool
    deadline_s: float
    paged: PagesWanted | None = None
    readers: int = 1


class Subscription:
    """One transfer on its way in."""

    def __init__(self, wanted: Wanted, on_outcome: Callable[[Outcome], None]) -> None:
        self.wanted = wanted
        self.on_outcome: Callable[[Outcome], None] | None = on_outcome
        self.nbytes = int(wanted.segments[:, 1].sum())
        self.generation = secrets.randbits(63) | 1
        self.session: Session | None = None
        self.window = 0
        self.parts: PartFetch | None = None
        self.deadline: Timer | None = None
        self.asked_at = time.monotonic()
        self.subscribed_at = 0.0


class Consumer:
    """All subscriptions of one engine."""

    def __init__(
        self,
        loop: ControlLoop,
        sessions: SessionTable,
        schema: KVCacheSchema | None = None,
        conversions: Conversions | None = None,
        target_dtype: str = "auto",
    ) -> None:
        self._loop = loop
        self._sessions = sessions
        self._schema = schema
        self._conversions = conversions
        self._target_dtype = target_dtype
        self._by_window: dict[tuple[int, int], Subscription] = {}
        self._by_generation: dict[int, Subscription] = {}

    def __len__(self) -> int:
        return len(self._by_generation)

    def subscribe(
        self, peer: PeerAddress | Session, wanted: Wanted, on_outcome: Callable[[Outcome], None]
    ) -> Subscription:
        """Begin to fetch, over a session with ``peer`` (dialled if need be) or over this very session."""
        subscription = Subscription(wanted, on_outcome)
        self._by_generation[subscription.generation] = subscription

        def late() -> None:
            self._fail(subscription, f"the deadline of {wanted.deadline_s:.0f} s passed")

        subscription.deadline = self._loop.call_later(wanted.deadline_s, late)
        if isinstance(peer, PeerAddress):
            self._sessions.get(peer, lambda session, why: self._on_session(subscription, session, why))
        elif self._sessions.find(peer.backend, peer.connection) is peer:
            self._on_session(subscription, peer, "")
        else:
            self._fail(subscription, "the session was lost before the subscription")
        return subscription

    def cancel(self, subscription: Subscription) -> None:
        """End it now; its outcome says so. Nothing happens if it had ended."""
        self._fail(subscription, "cancelled")

    def release(self, peer: PeerAddress, transfer_id: str, readers: int = 1, detail: str = "") -> None:
        """Tell the producer that this consumer, one of ``readers``, wants nothing of this transfer."""

        def tell(session: Session | None, _: str) -> None:
            if session is not None:
                session.send(m.Release(transfer_id, readers, detail))

        self._sessions.get(peer, tell)

    def renew(self, peer: PeerAddress, transfer_ids: tuple[str, ...]) -> None:
        """Ask the producer to keep these transfers for another lease."""

        def tell(session: Session | None, _: str) -> None:
            if session is not None:
                session.send(m.Renew(transfer_ids))

        self._sessions.get(peer, tell)

    def handle(self, session: Session, event: Event) -> None:
        """WINDOW_DONE and WINDOW_FAILED of open sessions."""
        subscription = self._by_window.get((id(session.backend), event.id))
        if subscription is None:
            for other in [s for s in self._by_generation.values() if s.parts and s.session is session]:
                if other.parts is not None:
                    other.parts.on_window(event)
            return
        if event.kind == EventKind.WINDOW_DONE:
            self._done(subscription, session, event.time_ns / 1e9)
        else:
            status = Status(event.status).name.lower()
            self._fail(
                subscription,
                f"{status} at bytes {event.offset} to {event.offset + event.length}"
                + (f": {event.detail}" if event.detail else ""),
            )

    def on_failed(self, session: Session, message: m.Failed) -> None:
        subscription = self._by_generation.get(message.generation) or next(
            (s for s in self._by_generation.values() if s.parts and s.parts.owns(message.generation)), None
        )
        if subscription is not None and subscription.session is session:
            self._fail(subscription, f"the producer gave up ({message.code}): {message.detail}", tell=False)

    def on_closed(self, session: Session, why: str) -> None:
        for subscription in [s for s in self._by_generation.values() if s.session is session]:
            self._fail(subscription, f"the session was lost: {why}", tell=False)

    def close(self) -> None:
        for subscription in list(self._by_generation.values()):
            self._fail(subscription, "the engine shuts down")

    def _on_session(self, subscription: Subscription, session: Session | None, why: str) -> None:
        if subscription.on_outcome is None:
            return
        if session is None:
            self._fail(subscription, why, reached=False)
            return
        wanted = subscription.wanted
        if session.refusal:
            self._refuse(subscription, session, session.refusal)
            return
        assert session.plan is not None
        theirs = session.peer.schema if session.peer else None
        ours, stage = self._schema, self._conversions
        # A CRC needs bytes that a CPU can read: they are staged then.
        on_device = session.backend.capabilities.device_memory and self._sessions.config.integrity != "crc"
        if (
            wanted.paged
            and ours
            and theirs
            and stage
            and needs_conversion(ours, theirs, self._target_dtype, device_memory=on_device)
        ):
            self._fetch_parts(subscription, session, wanted.paged, ours, stage)
            return
        if session.must_convert and wanted.selection:
            self._refuse(subscription, session, f"pages can't go as they are: {session.must_convert}")
            return
        try:
            window = session.backend.open_window(session.connection, wanted.segments, subscription.generation)
        except (OSError, ValueError) as error:
            self._fail(subscription, str(error))
            return
        subscription.session, subscription.window = session, window
        subscription.subscribed_at = time.monotonic()
        self._by_window[(id(session.backend), window)] = subscription
        session.hold()
        session.send(
            m.Subscribe(
                transfer_id=wanted.transfer_id,
                generation=subscription.generation,
                window=session.backend.window_descriptor(window),
                nbytes=subscription.nbytes,
                selection=wanted.selection,
                checksum=session.plan.checksum,
                finished=wanted.finished,
                timeout_ms=max(1, int(wanted.deadline_s * 1000)),
                readers=wanted.readers,
            )
        )

    def _fetch_parts(
        self,
        subscription: Subscription,
        session: Session,
        paged: PagesWanted,
        schema: KVCacheSchema,
        conversions: Conversions,
    ) -> None:
        wanted, plan = subscription.wanted, session.plan
        assert plan is not None

        def ended(error: str) -> None:
            if error:
                self._fail(subscription, error)
            else:
                self._done(subscription, session, time.monotonic())

        try:
            parts = PartFetch(
                session,
                schema,
                wanted.transfer_id,
                paged,
                self._target_dtype,
                conversions,
                subscription.asked_at + wanted.deadline_s,
                wanted.finished,
                # Bytes wait in staging memory on both sides: integrity=auto checks them on every backend.
                plan.checksum or self._sessions.config.integrity == "auto",
                ended,
            )
        except ValueError as error:
            self._refuse(subscription, session, str(error))
            return
        subscription.session, subscription.parts = session, parts
        subscription.nbytes = parts.nbytes
        subscription.subscribed_at = time.monotonic()
        session.hold()
        parts.start()

    def _done(self, subscription: Subscription, session: Session, landed_at: float) -> None:
        plan = session.plan
        assert plan is not None
        stats = TransferStats(
            transfer_id=subscription.wanted.transfer_id,
            nbytes=subscription.nbytes,
            wait_s=subscription.subscribed_at - subscription.asked_at,
            transfer_s=landed_at - subscription.subscribed_at,
            backend=plan.backend,
            mode=plan.mode,
            checksum=plan.checksum,
            wire_dtype=subscription.parts.plan.wire_dtype if subscription.parts else "same",
        )
        self._end(subscription, Outcome(subscription.wanted.transfer_id, stats, ""))

    def _refuse(self, subscription: Subscription, session: Session, why: str) -> None:
        """This transfer can't come from there; nothing was asked for yet."""
        wanted = subscription.wanted
        session.send(m.Release(wanted.transfer_id, wanted.readers, why[: m.MAX_DETAIL]))
        self._fail(subscription, why)

    def _fail(
        self, subscription: Subscription, error: str, *, tell: bool = True, reached: bool = True
    ) -> None:
        if subscription.on_outcome is None:
            return
        session = subscription.session
        if tell and session is not None:
            reader = subscription.parts.reader if subscription.parts else subscription.generation
            session.send(m.Cancel(subscription.wanted.transfer_id, reader))
        self._end(subscription, Outcome(subscription.wanted.transfer_id, None, error, reached))

    def _end(self, subscription: Subscription, outcome: Outcome) -> None:
        report, subscription.on_outcome = subscription.on_outcome, None
        if subscription.deadline is not None:
            subscription.deadline.cancel()
        self._by_generation.pop(subscription.generation, None)
        if subscription.parts is not None:
            subscription.parts.close()
        if subscription.session is not None:
            subscription.session.backend.close_window(subscription.window)
            self._by_window.pop((id(subscription.session.backend), subscription.window), None)
            subscription.session.drop()
        if report is not None:
            report(outcome)
