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

from sage_kv_connector.backends.base import Descriptors, Event, Status
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.plan import Outcome, TransferStats
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.control.loop import ControlLoop, Timer
from sage_kv_connector.engine.conversion.jobs import Conversions
from sage_kv_connector.engine.pages.source import Reader, SelectionError, Source
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.table import Session
from sage_kv_connector.engine.transfer.part_sender import PartSender

logger = logging.getLogger(__name__)

#: Subscriptions that may wait for their offer, and releases that came before it.
MAX_UNMATCHED = 4096

#: Called once when an offer's memory is free again; the outcome says whether it was delivered.
OnReleased = Callable[[Outcome], None]


class Stream:
    """One subscription, or one part of a converting one, being served."""

    def __init__(self, session: Session, request: m.Subscribe | m.SubscribePart) -> None:
        self.session = session
        self.request = request
        self.reader: Reader | None = None
        self.part: PartSender | None = None
        self.posts: set[int] = set()
        self.timer: Timer | None = None

    @property
    def reader_id(self) -> int:
        """What all streams of one consumer have in common."""
        return self.request.reader if isinstance(self.request, m.SubscribePart) else self.request.generation

    @property
    def delivered(self) -> bool:
        if self.posts:
            return False
        if self.part is not None:
            return self.part.posted
        return self.reader is not None and self.reader.exhausted


class Consuming:
    """One consumer of an offer: what it got so far, and whether its last part was asked for."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.begun_at = time.monotonic()
        self.nbytes = 0
        self.wire_dtype = "same"
        self.last_asked = False


class Offer:
    """One transfer id and its memory."""

    def __init__(
        self, transfer_id: str, source: Source, on_released: OnReleased, consumers: int, only_for: str
    ) -> None:
        self.transfer_id = transfer_id
        self.source = source
        self.on_released: OnReleased | None = on_released
        self.expected = consumers
        self.only_for = only_for
        self.offered_at = time.monotonic()
        self.stats: TransferStats | None = None
        self.streams: dict[int, Stream] = {}
        self.consuming: dict[int, Consuming] = {}
        self.served: set[int] = set()
        self.declined = 0
        self.trouble = ""  #: why a consumer did not get what it needed
        self.finished = False
        self.lease: Timer | None = None

    @property
    def done(self) -> bool:
        return len(self.served) + self.declined >= self.expected


class Producer:
    """All offers of one engine."""

    def __init__(
        self,
        loop: ControlLoop,
        config: KVTransportConfig,
        schema: KVCacheSchema | None = None,
        conversions: Conversions | None = None,
    ) -> None:
        self._loop = loop
        self._config = config
        self._schema = schema
        self._conversions = conversions
        self._offers: dict[str, Offer] = {}
        self._unmatched: dict[int, Stream] = {}
        self._unwanted: OrderedDict[str, list[m.Release]] = OrderedDict()  # id → what came before its offer
        self._given_up: OrderedDict[str, str] = OrderedDict()  # id → why it won't be offered
        self._posts: dict[tuple[int, int], tuple[Offer, Stream]] = {}
        self.bytes_sent = 0
        self.posting_ns = 0  #: time with at least one post under way
        self._posting_since = 0

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
        self._given_up.pop(transfer_id, None)
        declined = self._unwanted.pop(transfer_id, None)
        if declined is not None:
            for release in declined:
                self._decline(offer, release)
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

    def give_up(self, transfer_id: str, code: str, detail: str) -> None:
        """Like ``withdraw``, and whoever subscribes to it from now on is told at once."""
        self.withdraw(transfer_id, code, detail)
        for waiting in [s for s in self._unmatched.values() if s.request.transfer_id == transfer_id]:
            self._drop_unmatched(waiting, detail)
        self._given_up[transfer_id] = detail
        while len(self._given_up) > MAX_UNMATCHED:
            self._given_up.popitem(last=False)

    def close(self) -> None:
        for transfer_id in list(self._offers):
            self.withdraw(transfer_id, "shutting_down", "the producer shuts down")

    # -- the peers' side

    def on_subscribe(self, session: Session, request: m.Subscribe | m.SubscribePart) -> None:
        if session.refusal:
            session.send(
                m.Failed(request.transfer_id, request.generation, "schema", session.refusal[: m.MAX_DETAIL])
            )
            return
        stream = Stream(session, request)
        if session.must_convert and isinstance(request, m.Subscribe) and request.selection:
            self._fail(stream, "schema", f"pages can't go as they are: {session.must_convert}")
            return
        offer = self._offers.get(request.transfer_id)
        if offer is not None:
            self._attach(offer, stream)
        elif request.transfer_id in self._given_up:
            self._fail(stream, "unknown_transfer", self._given_up[request.transfer_id])
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
        for waiting in [s for s in self._unmatched.values() if s.reader_id == message.reader]:
            if waiting.session is session:
                self._drop_unmatched(waiting, "")
                self._remember_unwanted(waiting, "the consumer cancelled it")
        offer = self._offers.get(message.transfer_id)
        consuming = offer.consuming.get(message.reader) if offer is not None else None
        if offer is not None and consuming is not None and consuming.session is session:
            self._served(offer, message.reader, "the consumer cancelled it")

    def on_release(self, message: m.Release) -> None:
        offer = self._offers.get(message.transfer_id)
        if offer is not None:
            self._decline(offer, message)
            self._release_if_served(offer)
        else:
            self._remember(message)

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
        if not self._posts:
            self.posting_ns += time.monotonic_ns() - self._posting_since
        offer, stream = known
        stream.posts.discard(event.id)
        if event.status == Status.OK:
            self.bytes_sent += event.length
            if stream.delivered:
                self._delivered(offer, stream)
        elif stream.request.generation in offer.streams:
            self._broken(offer, stream, "send_failed", event.detail or Status(event.status).name.lower())

    def on_closed(self, session: Session, why: str) -> None:
        for waiting in [s for s in self._unmatched.values() if s.session is session]:
            self._drop_unmatched(waiting, "")
            self._remember_unwanted(waiting, f"the session was lost: {why}")
        for offer in list(self._offers.values()):
            for reader_id in [r for r, c in offer.consuming.items() if c.session is session]:
                self._served(offer, reader_id, f"the session was lost: {why}")

    # -- inside

    def _attach(self, offer: Offer, stream: Stream) -> None:
        request = stream.request
        if stream.timer is None:
            stream.session.hold()
        else:
            stream.timer.cancel()
        offer.streams[request.generation] = stream
        consuming = offer.consuming.setdefault(stream.reader_id, Consuming(stream.session))
        try:
            peer = stream.session.peer
            if offer.only_for and (peer is None or peer.engine_id != offer.only_for):
                raise SelectionError(f"this transfer is offered to engine {offer.only_for} only")
            if consuming.session is not stream.session or stream.reader_id in offer.served:
                raise SelectionError("this reader is another session's, or was served already")
            offer.expected = max(offer.expected, request.readers)
            if isinstance(request, m.SubscribePart):
                consuming.last_asked |= request.last
                consuming.wire_dtype = request.formats[0].dtype
                stream.part = self._part_sender(offer, stream, request)
            else:
                stream.reader = offer.source.reader(request.selection, request.nbytes)
        except ValueError as error:
            self._broken(offer, stream, "bad_selection", str(error))
            return
        if offer.lease is not None:
            offer.lease.cancel()
        stream.timer = self._loop.call_later(
            request.timeout_ms / 1000, lambda: self._stream_late(offer, stream)
        )
        self._pump(offer, stream)

    def _part_sender(self, offer: Offer, stream: Stream, request: m.SubscribePart) -> PartSender:
        peer = stream.session.peer
        if self._schema is None or self._conversions is None or peer is None or peer.schema is None:
            raise SelectionError("no schema describes this cache: it can't be converted")
        return PartSender(
            request,
            offer.source.part(request),
            self._schema,
            peer.schema,
            stream.session,
            self._conversions,
            on_encoded=lambda segment: self._post(offer, stream, segment),
            on_failed=lambda why: self._broken(offer, stream, "conversion", why),
        )

    def _pump(self, offer: Offer, stream: Stream) -> None:
        try:
            if stream.part is not None:
                stream.part.pump()
                return
            assert stream.reader is not None
            descriptors = stream.reader.take_ready()
        except ValueError as error:
            self._broken(offer, stream, "bad_selection", str(error))
            return
        if descriptors is not None:
            self._post(offer, stream, descriptors)

    def _post(self, offer: Offer, stream: Stream, descriptors: Descriptors) -> None:
        request = stream.request
        if request.generation not in offer.streams:
            return
        try:
            post = stream.session.backend.post(
                stream.session.connection,
                request.window,
                descriptors,
                request.generation,
                checksum=request.checksum or bool(stream.session.plan and stream.session.plan.checksum),
            )
        except (OSError, ValueError) as error:
            self._broken(offer, stream, "post", str(error))
            return
        stream.posts.add(post)
        if not self._posts:
            self._posting_since = time.monotonic_ns()
        self._posts[(id(stream.session.backend), post)] = (offer, stream)

    def _broken(self, offer: Offer, stream: Stream, code: str, why: str) -> None:
        if stream.request.generation in offer.streams:
            self._fail(stream, code, why)
            self._served(offer, stream.reader_id, why)

    def _detach(self, offer: Offer, stream: Stream) -> None:
        """Stop to serve a stream; what it has in flight is revoked."""
        if offer.streams.pop(stream.request.generation, None) is None:
            return
        for post in stream.posts:
            stream.session.backend.cancel(post)
        if stream.part is not None:
            stream.part.close()
        if stream.timer is not None:
            stream.timer.cancel()
        stream.session.drop()

    def _delivered(self, offer: Offer, stream: Stream) -> None:
        consuming = offer.consuming[stream.reader_id]
        consuming.nbytes += stream.request.nbytes
        self._detach(offer, stream)
        more = isinstance(stream.request, m.SubscribePart) and (
            not consuming.last_asked or any(s.reader_id == stream.reader_id for s in offer.streams.values())
        )
        if not more:
            offer.stats = _stats(offer, consuming)
            self._served(offer, stream.reader_id)
        elif offer.finished and not offer.streams:
            self._start_lease(offer)

    def _served(self, offer: Offer, reader_id: int, trouble: str = "") -> None:
        """One consumer has all it wanted, or won't get it (``trouble``): end its streams."""
        offer.trouble = offer.trouble or trouble
        for stream in [s for s in offer.streams.values() if s.reader_id == reader_id]:
            self._detach(offer, stream)
        offer.served.add(reader_id)
        offer.consuming.pop(reader_id, None)
        self._release_if_served(offer)

    def _release_if_served(self, offer: Offer) -> None:
        if offer.finished and offer.done and not offer.streams:
            self._release(offer, offer.trouble)

    def _release(self, offer: Offer, why: str) -> None:
        report, offer.on_released = offer.on_released, None
        self._offers.pop(offer.transfer_id, None)
        if offer.lease is not None:
            offer.lease.cancel()
        if report is not None:
            report(Outcome(offer.transfer_id, offer.stats, "" if offer.stats else why))

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
            self._broken(offer, stream, "expired", "the subscription's time is over")

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

    def _decline(self, offer: Offer, release: m.Release) -> None:
        offer.declined += 1
        offer.expected = max(offer.expected, release.readers)
        offer.trouble = offer.trouble or release.detail

    def _remember_unwanted(self, stream: Stream, why: str) -> None:
        request = stream.request
        self._remember(m.Release(request.transfer_id, request.readers, why))

    def _remember(self, release: m.Release) -> None:
        """A consumer gave up what was not offered yet."""
        self._unwanted.setdefault(release.transfer_id, []).append(release)
        while len(self._unwanted) > MAX_UNMATCHED:
            self._unwanted.popitem(last=False)


def _stats(offer: Offer, consuming: Consuming) -> TransferStats:
    plan = consuming.session.plan
    assert plan is not None
    return TransferStats(
        transfer_id=offer.transfer_id,
        nbytes=consuming.nbytes,
        wait_s=max(0.0, consuming.begun_at - offer.offered_at),
        transfer_s=time.monotonic() - consuming.begun_at,
        backend=plan.backend,
        mode=plan.mode,
        checksum=plan.checksum,
        wire_dtype=consuming.wire_dtype,
    )
