# SPDX-License-Identifier: Apache-2.0
"""The prefill side: transfers on offer, who subscribed to them, and when their memory is free again.

Life of an offer: ``offer`` (prefill began) → ``pump`` whenever more of it is
ready → ``finish`` (prefill ended; the lease runs unless a subscriber is being
served) → ``on_released`` exactly once, after which nothing reads its memory.
A subscription may come before the offer (concurrent dispatch); it waits. Control
thread only.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.engine import messages as m
from sage_kv_connector.engine.loop import ControlLoop, Timer
from sage_kv_connector.engine.session import Session
from sage_kv_connector.engine.source import Reader, SelectionError, Source

logger = logging.getLogger(__name__)

#: Subscriptions that may wait for their offer, and releases that came before it.
MAX_UNMATCHED = 4096

#: Called once when an offer's memory is free again; the outcome says whether it was delivered.
OnReleased = Callable[[Outcome], None]


class Stream:
    """One subscription being served."""

    def __init__(self, session: Session, request: m.Subscribe) -> None:
        self.session = session
        self.request = request
        self.reader: Reader | None = None
        self.posts: set[int] = set()
        self.timer: Timer | None = None
        self.attached_at = 0.0

    @property
    def delivered(self) -> bool:
        return self.reader is not None and self.reader.exhausted and not self.posts


class Offer:
    """One transfer id and its memory."""

    def __init__(
        self, transfer_id: str, source: Source, on_released: OnReleased, consumers: int, only_for: str
    ) -> None:
        self.transfer_id = transfer_id
        self.source = source
        self.on_released: OnReleased | None = on_released
        self.consumers_left = consumers
        self.only_for = only_for
        self.offered_at = time.monotonic()
        self.stats: TransferStats | None = None
        self.streams: dict[int, Stream] = {}
        self.finished = False
        self.lease: Timer | None = None


class Producer:
    """All offers of one engine."""

    def __init__(self, loop: ControlLoop, config: KVTransportConfig) -> None:
        self._loop = loop
        self._config = config
        self._offers: dict[str, Offer] = {}
        self._unmatched: dict[int, Stream] = {}
        self._unwanted: OrderedDict[str, None] = OrderedDict()
        self._posts: dict[tuple[int, int], tuple[Offer, Stream]] = {}
        self.bytes_sent = 0

    def __len__(self) -> int:
        return len(self._offers) + len(self._unmatched)

    # -- the engine's side

    def offer(
        self,
        transfer_id: str,
        source: Source,
        on_released: OnReleased,
        *,
        consumers: int = 1,
        only_for: str = "",
    ) -> None:
        """Put a transfer on offer; it is released after ``consumers`` subscribers were served.

        ``only_for``: no engine but this one may subscribe ("" = any that knows the secret).

        Raises ValueError for an id that is on offer already.
        """
        if transfer_id in self._offers:
            raise ValueError(f"transfer_id {transfer_id!r} is on offer already")
        offer = self._offers[transfer_id] = Offer(transfer_id, source, on_released, consumers, only_for)
        if transfer_id in self._unwanted:
            del self._unwanted[transfer_id]
            offer.consumers_left = 0
        for stream in [s for s in self._unmatched.values() if s.request.transfer_id == transfer_id]:
            del self._unmatched[stream.request.generation]
            self._attach(offer, stream)

    def pump(self, transfer_id: str) -> None:
        """Post what became ready."""
        offer = self._offers.get(transfer_id)
        if offer is not None:
            for stream in list(offer.streams.values()):
                self._pump(offer, stream)

    def is_streaming(self, transfer_id: str) -> bool:
        offer = self._offers.get(transfer_id)
        return offer is not None and bool(offer.streams)

    def finish(self, transfer_id: str) -> None:
        """Nothing more becomes ready; from now on the memory is only held for subscribers."""
        offer = self._offers.get(transfer_id)
        if offer is None:
            return
        offer.finished = True
        self.pump(transfer_id)
        self._start_lease(offer)
        self._release_if_served(offer)

    def withdraw(self, transfer_id: str, code: str, detail: str) -> None:
        """End an offer now: revoke what is in flight and tell its subscribers why."""
        offer = self._offers.get(transfer_id)
        if offer is None:
            return
        for stream in list(offer.streams.values()):
            self._fail(stream, code, detail)
            self._detach(offer, stream)
        self._release(offer, detail)

    def close(self) -> None:
        for transfer_id in list(self._offers):
            self.withdraw(transfer_id, "shutting_down", "the producer shuts down")

    # -- the peers' side

    def on_subscribe(self, session: Session, request: m.Subscribe) -> None:
        if session.refusal:
            session.send(
                m.Failed(request.transfer_id, request.generation, "schema", session.refusal[: m.MAX_DETAIL])
            )
            return
        stream = Stream(session, request)
        offer = self._offers.get(request.transfer_id)
        if offer is not None:
            self._attach(offer, stream)
        elif request.finished:
            self._fail(stream, "unknown_transfer", "never offered here, or released already (lease expired)")
        elif len(self._unmatched) >= MAX_UNMATCHED or request.generation in self._unmatched:
            self._fail(stream, "busy", f"more than {MAX_UNMATCHED} subscriptions wait for their prefill")
        else:
            self._unmatched[request.generation] = stream
            session.hold()
            stream.timer = self._loop.call_later(
                min(self._config.unmatched_timeout_s, request.timeout_ms / 1000),
                lambda: self._drop_unmatched(stream, "no prefill with this transfer id arrived in time"),
            )

    def on_cancel(self, session: Session, message: m.Cancel) -> None:
        waiting = self._unmatched.get(message.generation)
        if waiting is not None and waiting.session is session:
            self._drop_unmatched(waiting, "")
            self._remember_unwanted(message.transfer_id)
            return
        offer = self._offers.get(message.transfer_id)
        stream = offer.streams.get(message.generation) if offer is not None else None
        if offer is not None and stream is not None and stream.session is session:
            self._detach(offer, stream)
            self._served(offer)

    def on_release(self, message: m.Release) -> None:
        offer = self._offers.get(message.transfer_id)
        if offer is not None:
            self._served(offer)
        else:
            self._remember_unwanted(message.transfer_id)

    def on_renew(self, message: m.Renew) -> None:
        for transfer_id in message.transfer_ids:
            offer = self._offers.get(transfer_id)
            if offer is not None and offer.finished:
                self._start_lease(offer)

    def on_sent(self, session: Session, event: Event) -> None:
        """SENT events of open sessions."""
        known = self._posts.pop((id(session.backend), event.id), None)
        if known is None:
            return
        offer, stream = known
        stream.posts.discard(event.id)
        if event.status == Status.OK:
            self.bytes_sent += event.length
            if stream.delivered:
                offer.stats = _stats(offer, stream)
                self._detach(offer, stream)
                self._served(offer)
        elif stream.request.generation in offer.streams:
            self._fail(stream, "send_failed", event.detail or Status(event.status).name.lower())
            self._detach(offer, stream)
            self._served(offer)

    def on_closed(self, session: Session, why: str) -> None:
        for waiting in [s for s in self._unmatched.values() if s.session is session]:
            self._drop_unmatched(waiting, "")
            self._remember_unwanted(waiting.request.transfer_id)
        for offer in list(self._offers.values()):
            for stream in [s for s in offer.streams.values() if s.session is session]:
                self._detach(offer, stream)
                self._served(offer)

    # -- inside

    def _attach(self, offer: Offer, stream: Stream) -> None:
        try:
            peer = stream.session.peer
            if offer.only_for and (peer is None or peer.engine_id != offer.only_for):
                raise SelectionError(f"this transfer is offered to engine {offer.only_for} only")
            stream.reader = offer.source.reader(stream.request.selection, stream.request.nbytes)
        except SelectionError as error:
            if stream.timer is not None:
                stream.timer.cancel()
                stream.session.drop()
            self._fail(stream, "bad_selection", str(error))
            self._served(offer)
            return
        if stream.timer is None:
            stream.session.hold()
        else:
            stream.timer.cancel()
        offer.streams[stream.request.generation] = stream
        stream.attached_at = time.monotonic()
        if offer.lease is not None:
            offer.lease.cancel()
        stream.timer = self._loop.call_later(
            stream.request.timeout_ms / 1000, lambda: self._stream_late(offer, stream)
        )
        self._pump(offer, stream)

    def _pump(self, offer: Offer, stream: Stream) -> None:
        assert stream.reader is not None
        request = stream.request
        try:
            descriptors = stream.reader.take_ready()
            if descriptors is None:
                return
            post = stream.session.backend.post(
                stream.session.connection,
                request.window,
                descriptors,
                request.generation,
                checksum=request.checksum or bool(stream.session.plan and stream.session.plan.checksum),
            )
        except (OSError, ValueError) as error:
            self._fail(stream, "bad_selection" if isinstance(error, SelectionError) else "post", str(error))
            self._detach(offer, stream)
            self._served(offer)
            return
        stream.posts.add(post)
        self._posts[(id(stream.session.backend), post)] = (offer, stream)

    def _detach(self, offer: Offer, stream: Stream) -> None:
        """Stop to serve a subscription; what it has in flight is revoked."""
        if offer.streams.pop(stream.request.generation, None) is None:
            return
        for post in stream.posts:
            stream.session.backend.cancel(post)
        if stream.timer is not None:
            stream.timer.cancel()
        stream.session.drop()

    def _served(self, offer: Offer) -> None:
        offer.consumers_left -= 1
        self._release_if_served(offer)

    def _release_if_served(self, offer: Offer) -> None:
        if offer.finished and offer.consumers_left <= 0 and not offer.streams:
            self._release(offer, "")

    def _release(self, offer: Offer, why: str) -> None:
        report, offer.on_released = offer.on_released, None
        self._offers.pop(offer.transfer_id, None)
        if offer.lease is not None:
            offer.lease.cancel()
        if report is not None:
            error = "" if offer.stats else why or "released without a transfer"
            report(Outcome(offer.transfer_id, offer.stats, error))

    def _start_lease(self, offer: Offer) -> None:
        if offer.lease is not None:
            offer.lease.cancel()

        def expired() -> None:
            if not offer.streams:
                logger.warning("transfer %s: nobody fetched it within its lease", offer.transfer_id)
                self.withdraw(offer.transfer_id, "expired", "the lease expired")

        offer.lease = self._loop.call_later(self._config.lease_s, expired)

    def _stream_late(self, offer: Offer, stream: Stream) -> None:
        if stream.request.generation in offer.streams:
            self._fail(stream, "expired", "the subscription's time is over")
            self._detach(offer, stream)
            self._served(offer)

    def _drop_unmatched(self, stream: Stream, detail: str) -> None:
        if self._unmatched.pop(stream.request.generation, None) is None:
            return
        if stream.timer is not None:
            stream.timer.cancel()
        stream.session.drop()
        if detail:
            self._fail(stream, "unknown_transfer", detail)

    def _fail(self, stream: Stream, code: str, detail: str) -> None:
        request = stream.request
        stream.session.send(m.Failed(request.transfer_id, request.generation, code, detail[: m.MAX_DETAIL]))

    def _remember_unwanted(self, transfer_id: str) -> None:
        self._unwanted[transfer_id] = None
        while len(self._unwanted) > MAX_UNMATCHED:
            self._unwanted.popitem(last=False)


def _stats(offer: Offer, stream: Stream) -> TransferStats:
    plan = stream.session.plan
    assert plan is not None
    return TransferStats(
        transfer_id=offer.transfer_id,
        nbytes=stream.request.nbytes,
        wait_s=max(0.0, stream.attached_at - offer.offered_at),
        transfer_s=time.monotonic() - stream.attached_at,
        backend=plan.backend,
        mode=plan.mode,
        checksum=plan.checksum,
    )
