# SPDX-License-Identifier: Apache-2.0
"""The decode side: subscribe to a transfer, let its window fill, report how it ended.

Life of a subscription: ``subscribe`` → session → window + Subscribe message →
WINDOW_DONE | WINDOW_FAILED | Failed message | session lost | deadline | cancel.
Whatever happens, ``on_outcome`` is called exactly once, and by then the backend
writes nothing into the target any more. Control thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from sage_kv_connector.backends.base import Event, EventKind
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.failure import Code, Failure, Reason, Stage, fault, reason_of_peer
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.pages.target import PagesTarget
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.session.table import SessionTable
from sage_kv_connector.engine.transfer import timeline
from sage_kv_connector.engine.transfer.page_read import page_read
from sage_kv_connector.engine.transfer.part_fetch import PartFetch
from sage_kv_connector.engine.transfer.subscription import OnOutcome, Subscription, Wanted
from sage_kv_connector.engine.transfer.windows import Windows, failure
from sage_kv_connector.telemetry.recording.recorder import Recorder

logger = logging.getLogger(__name__)

#: Of one subscription, where nothing moved.
MAX_TRIES = 5


class Consumer:
    """All subscriptions of one engine. ``converters``: None where its cache can't be converted."""

    def __init__(
        self,
        loop: ControlLoop,
        sessions: SessionTable,
        config: KVTransportConfig,
        converters: Converters | None,
        recorder: Recorder,
    ) -> None:
        self._loop = loop
        self._sessions = sessions
        self._config = config
        self._converters = converters
        self._recorder = recorder
        self._windows = Windows()
        self._open: dict[Subscription, None] = {}
        self._ended: Reason | None = None  #: why nothing begins any more

    def __len__(self) -> int:
        return len(self._open)

    # -- the engine's side

    def subscribe(
        self,
        peer: PeerAddress | Session,
        wanted: Wanted,
        on_outcome: OnOutcome,
        on_started: Callable[[Subscription], None] | None = None,
    ) -> None:
        """Begin to fetch, over a session with ``peer`` (dialled if need be) or over this very session.

        ``on_started`` gives the handle for ``cancel``, before any outcome.
        """
        subscription = Subscription(wanted, on_outcome, peer if isinstance(peer, PeerAddress) else None)
        self._open[subscription] = None
        subscription.peer = peer.label
        if self._ended is not None:
            self._fail(subscription, self._ended)
            return
        late = Reason(Code.DEADLINE, f"the deadline of {wanted.deadline_s:g} s passed")
        subscription.deadline = self._loop.call_later(wanted.deadline_s, self._fail, subscription, late)
        if on_started is not None:
            on_started(subscription)
        if isinstance(peer, PeerAddress):
            self._sessions.get(peer, partial(self._on_session, subscription))
        elif self._sessions.find(peer.backend, peer.connection) is peer:
            self._on_session(subscription, peer)
        else:
            self._fail(subscription, Reason(Code.SESSION_LOST, "before the subscription"))

    def cancel(self, subscription: Subscription) -> None:
        """End it now; its outcome says so. Nothing happens if it had ended."""
        self._fail(subscription, Reason(Code.CANCELLED, "nobody here wants it any more"), aborted=True)

    def cancel_all(self, subscriptions: Iterable[Subscription]) -> None:
        for subscription in list(subscriptions):
            self.cancel(subscription)

    def close(self, why: Reason) -> None:
        """Every subscription ends, and each that comes."""
        self._ended = why
        for subscription in list(self._open):
            self._fail(subscription, why, aborted=why.code is Code.SHUTTING_DOWN)

    # -- the peers' side

    def on_window(self, session: Session, event: Event) -> None:
        """WINDOW_DONE and WINDOW_FAILED of open sessions."""
        self._windows.handle(session, event)

    def on_failed(self, session: Session, message: m.Failed) -> None:
        subscription = self._windows.owner(message.generation)
        if subscription is not None and subscription.session is session:
            why = reason_of_peer(message.code, message.detail)
            if message.again_ms and subscription.tries < MAX_TRIES:
                self._recorder.add("retries_total", (str(why.code),))
                self._detach(subscription)
                subscription.begin_again(why)
                subscription.again = self._loop.call_later(
                    message.again_ms / 1000, self._again, subscription, session
                )
                return
            self._fail(subscription, why, tell=False, stage=FAILURE_KINDS[why.code].stage)

    def on_ready(self, session: Session, message: m.PartsReady) -> None:
        subscription = self._windows.owner(message.generation)
        if subscription is not None and subscription.session is session and subscription.parts is not None:
            subscription.parts.ready()

    def on_closed(self, session: Session, why: str) -> None:
        for subscription in [s for s in self._open if s.session is session]:
            if subscription.parts is None or not subscription.parts.landed:
                self._lost(subscription, Reason(Code.SESSION_LOST, why))

    # -- inside

    def _on_session(self, subscription: Subscription, session: Session | Reason) -> None:
        if subscription.on_outcome is None:
            return
        if isinstance(session, Reason):
            self._fail(subscription, subscription.lost_and(session))
            return
        try:
            self._agree(subscription, session)
        except Exception as error:
            logger.debug("%s: transfer %s", session.label, subscription.wanted.transfer_id, exc_info=True)
            self._fail(subscription, fault(error))

    def _agree(self, subscription: Subscription, session: Session) -> None:
        subscription.stage = Stage.AGREE
        target, verdict = subscription.wanted.target, session.verdict
        if verdict.refusal is not None:
            self._refuse(subscription, session, verdict.refusal)
        elif isinstance(target, PagesTarget) and target.has_tokens and self._must_convert(session):
            if session.backend.capabilities.parts:
                self._fetch_parts(subscription, session, target)
            else:
                why = f"backend {session.backend.capabilities.name} does not convert"
                self._refuse(subscription, session, Reason(Code.SCHEMA, why))
        elif verdict.must_convert and target.selection:
            why = f"pages can't go as they are: {verdict.must_convert}"
            self._refuse(subscription, session, Reason(Code.SCHEMA, why))
        else:
            self._fetch(subscription, session)

    def _must_convert(self, session: Session) -> bool:
        if session.converts is None:
            converters = self._converters
            session.converts = converters is not None and converters.needed(session, self._config)
        return session.converts

    def _fetch(self, subscription: Subscription, session: Session) -> None:
        """Pages or memory as they are: one window over the target; or over the peer's pages, which are read."""
        generation, plan = subscription.generation, session.plan
        assert plan is not None
        subscription.nbytes = subscription.read.nbytes if subscription.read else subscription.kv_bytes
        receiver = partial(self._on_event, subscription, session)
        try:
            window = subscription.open_window(session)
        except ConnectionError:
            self._subscribed(subscription, session)
            return  # the session says so a moment later
        except (OSError, ValueError) as error:
            self._fail(subscription, Reason(Code.MEMORY, str(error)))
            return
        subscription.window = window
        self._windows.own(generation, subscription)
        self._windows.opened(session, window, receiver)
        self._subscribed(subscription, session)
        session.send(subscription.message(session.backend.window_descriptor(window), plan.checksum))

    def _fetch_parts(self, subscription: Subscription, session: Session, target: PagesTarget) -> None:
        plan = session.plan
        assert plan is not None and self._converters is not None
        subscription.read = page_read(session, target, self._config, self._converters)
        if subscription.read is not None:
            self._fetch(subscription, session)
            return
        try:
            parts = PartFetch(
                subscription,
                session,
                target,
                self._config.target_dtype,
                self._converters,
                self._windows,
                # Bytes wait in staging memory on both sides: integrity=auto checks them on every backend.
                plan.checksum or self._config.integrity == "auto",
                partial(self._parts_ended, subscription, session),
            )
        except ValueError as error:
            self._refuse(subscription, session, Reason(Code.SCHEMA, str(error)))
            return
        subscription.parts = parts
        subscription.nbytes = parts.nbytes
        self._subscribed(subscription, session)
        parts.start()

    def _subscribed(self, subscription: Subscription, session: Session) -> None:
        subscription.session = session
        subscription.stage = Stage.WAIT
        subscription.subscribed_at = time.monotonic()
        session.hold()

    def _parts_ended(self, subscription: Subscription, session: Session, why: Reason | None) -> None:
        if why is not None:
            self._fail(subscription, why, stage=FAILURE_KINDS[why.code].stage)
        else:
            subscription.decoded_at = time.monotonic()
            self._done(subscription, session)

    def _on_event(self, subscription: Subscription, session: Session, event: Event) -> None:
        if event.kind == EventKind.WINDOW_DONE:
            subscription.moved(event.began_ns, event.time_ns)
            self._done(subscription, session)
            return
        subscription.window_failed(session, event)
        where = f"at bytes {event.offset} to {event.offset + event.length}"
        self._fail(subscription, failure(event, where), stage=Stage.MOVE)

    def _done(self, subscription: Subscription, session: Session) -> None:
        self._end(subscription, subscription.arrived(session))

    def _refuse(self, subscription: Subscription, session: Session, why: Reason) -> None:
        """This transfer can't come from there; nothing was asked for yet."""
        wanted = subscription.wanted
        detail = str(why)[: m.MAX_DETAIL]
        session.send(m.Release(wanted.transfer_id, wanted.consumers, detail, wanted.prompt))
        self._fail(subscription, why)

    def _lost(self, subscription: Subscription, why: Reason) -> None:
        """Its session is gone; where nothing moved yet, another one is tried once."""
        stage, nbytes = subscription.stage, subscription.nbytes
        landed = self._detach(subscription)
        if landed or subscription.tries > 1 or subscription.address is None:
            subscription.session = None
            moved = f"{why.detail}; {landed} bytes had moved" if landed else why.detail
            self._fail(subscription, why._replace(detail=moved), stage=stage)
            return
        logger.info("%s: %s, %s bytes are asked for again", subscription.peer, why, nbytes)
        self._recorder.add("retries_total", (str(why.code),))
        subscription.begin_again(why)
        subscription.lost = why
        self._sessions.get(subscription.address, partial(self._on_session, subscription))

    def _again(self, subscription: Subscription, session: Session) -> None:
        """The peer was busy, and said when to come back."""
        subscription.again = None
        if subscription.address is not None:
            self._sessions.get(subscription.address, partial(self._on_session, subscription))
        elif self._sessions.find(session.backend, session.connection) is session:
            self._on_session(subscription, session)
        else:
            self._fail(subscription, Reason(Code.SESSION_LOST, "while the peer was busy"))

    def _fail(
        self,
        subscription: Subscription,
        why: Reason,
        *,
        tell: bool = True,
        stage: Stage | None = None,
        aborted: bool = False,
    ) -> None:
        if subscription.on_outcome is None:
            return
        transfer_id, session = subscription.wanted.transfer_id, subscription.session
        if tell and session is not None:
            session.send(m.Cancel(transfer_id, subscription.generation))
        stage = stage or subscription.stage
        ended = Failure(why.code, stage, why.detail, subscription.peer, subscription.nbytes, aborted)
        self._end(subscription, Outcome(transfer_id, None, ended))

    def _end(self, subscription: Subscription, outcome: Outcome) -> None:
        report, subscription.on_outcome = subscription.on_outcome, None
        if subscription.deadline is not None:
            subscription.deadline.cancel()
        if subscription.again is not None:
            subscription.again.cancel()
        self._open.pop(subscription, None)
        self._detach(subscription)
        if report is not None:
            record = self._recorder.ended(timeline.incoming(subscription, outcome))
            report(outcome._replace(stages=record.stages))

    def _detach(self, subscription: Subscription) -> int:
        """From its session: nothing writes into its memory any more. Returns what landed, in bytes."""
        landed, session = 0, subscription.session
        if subscription.parts is not None:
            landed = subscription.parts.close()
        elif session is not None:
            landed = self._windows.close(session, subscription.window)
            self._windows.forget(subscription.generation)
        if session is not None:
            session.drop()
        return landed
