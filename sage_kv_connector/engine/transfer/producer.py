# SPDX-License-Identifier: Apache-2.0
"""The prefill side: what is on offer is posted to who subscribed, and its memory freed when all are served.

Life of an offer: ``offer`` (prefill began) → its source grows, and ``pump`` where lanes don't
see that → ``finish`` (prefill ended; the lease runs unless a consumer is being
served) → ``on_released`` exactly once, after which nothing reads its memory.
A subscription may come before the offer (concurrent dispatch); it waits (``early.py``). Control
thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.backends.paged_backend import PagedBackend
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.failure import Code, Reason, fault
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.pages.paged import PagedCursor, refusal_code
from sage_kv_connector.engine.pages.source import SelectionError, Source, refusal
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer.early import Early
from sage_kv_connector.engine.transfer.offer import (
    NO_TERMS,
    Offer,
    OfferTerms,
    OnReleased,
    Stream,
)
from sage_kv_connector.engine.transfer.offer_table import OfferTable
from sage_kv_connector.engine.transfer.part_sender import part_sender
from sage_kv_connector.engine.transfer.posts import Posts

logger = logging.getLogger(__name__)


class Producer:
    """All offers of one engine. ``converters``: None where its cache can't be converted."""

    def __init__(self, loop: ControlLoop, config: KVTransportConfig, converters: Converters | None) -> None:
        self._loop = loop
        self._lease_s = config.lease_s
        self._converters = converters
        self._offers = OfferTable()
        self._early = Early(loop, config.unmatched_timeout_s, self._late)
        self.posts = Posts()

    def __len__(self) -> int:
        return len(self._offers) + len(self._early)

    # -- the engine's side

    def offer(
        self, transfer_id: str, source: Source, on_released: OnReleased, terms: OfferTerms = NO_TERMS
    ) -> None:
        """Put a transfer on offer. An id that is on offer already is released at once, with that reason."""
        if self._offers.get(transfer_id) is not None:
            twice = Reason(Code.DUPLICATE, f"transfer_id {transfer_id!r} is on offer already")
            on_released(Offer(transfer_id, source, on_released, terms).outcome(twice))
            return
        offer = Offer(transfer_id, source, on_released, terms)
        self._offers.add(offer)
        for release in self._early.take_releases(offer):
            offer.decline(release)
        for stream in self._early.fitting(offer):
            if offer.has_room(stream.request.consumers):
                self._early.take(stream)
                self._attach(offer, stream)
            else:
                self._early.leave_to_siblings(stream)
        if terms.finished:
            self.finish(transfer_id)

    def pump(self, transfer_id: str) -> None:
        """Post what became ready for streams that lanes don't serve by themselves."""
        offer = self._offers.get(transfer_id)
        if offer is not None:
            for stream in list(offer.streams.values()):
                if not stream.by_lanes:
                    self._guarded(offer, stream, self._pump)

    def is_streaming(self, transfer_id: str) -> bool:
        offer = self._offers.get(transfer_id)
        return offer is not None and bool(offer.streams)

    def must_pump(self, transfer_id: str) -> bool:
        """Whether some stream waits for ``pump``; any thread may ask, after it changed the source."""
        offer = self._offers.get(transfer_id)
        return offer is not None and offer.must_pump

    def finish(self, transfer_id: str) -> None:
        """Nothing more becomes ready; from now on the memory is only held for consumers."""
        offer = self._offers.get(transfer_id)
        if offer is None:
            return
        offer.finished = True
        self.pump(transfer_id)
        self._start_lease(offer)
        self._release_if_done(offer)

    def withdraw(self, transfer_ids: Iterable[str], why: Reason) -> None:
        """End offers now: revoke what is in flight and tell their consumers why."""
        for transfer_id in transfer_ids:
            if (offer := self._offers.get(transfer_id)) is not None:
                for stream in list(offer.streams.values()):
                    stream.fail(why)
                    self._detach(offer, stream)
                self._release(offer, why)

    def give_up(self, transfer_ids: Iterable[str], why: Reason) -> None:
        """Like ``withdraw``, and whoever subscribes to them from now on is told at once."""
        for transfer_id in transfer_ids:
            self.withdraw((transfer_id,), why)
            self._early.give_up(transfer_id, why)

    def close(self) -> None:
        why = Reason(Code.SHUTTING_DOWN, "the producer shuts down")
        self.withdraw([o.transfer_id for o in self._offers], why)

    # -- the peers' side

    def on_subscribe(self, session: Session, request: m.Subscribe | m.SubscribeParts) -> None:
        stream = Stream(session, request)
        if session.verdict.refusal:
            stream.fail(session.verdict.refusal)
            return
        must_convert = session.verdict.must_convert
        if must_convert and isinstance(request, m.Subscribe) and request.selection:
            stream.fail(Reason(Code.SCHEMA, f"pages can't go as they are: {must_convert}"))
            return
        generation = request.generation
        if self._offers.of_consumer(session, generation) or self._offers.has_ended(session, generation):
            stream.fail(Reason(Code.BAD_SELECTION, f"generation: {generation} was subscribed already"))
            return
        offer, difference = self._offers.find_for(request)
        if offer is None:
            self._early.add(stream, difference)
        else:
            self._attach(offer, stream)

    def on_grant(self, session: Session, message: m.Grant) -> None:
        offer = self._offers.of_consumer(session, message.generation)
        if offer is not None:
            offer.streams[message.generation].grant(message)

    def on_cancel(self, session: Session, message: m.Cancel) -> None:
        self._early.cancel(session, message.generation)
        offer = self._offers.of_consumer(session, message.generation)
        if offer is not None:
            why = Reason(Code.CANCELLED, "decode wants it no more")
            self._served(offer, offer.streams[message.generation], why)

    def on_release(self, message: m.Release) -> None:
        offer, difference = self._offers.find(message.transfer_id, message.prompt, message.consumers)
        if offer is not None:
            offer.decline(message)
            self._release_if_done(offer)
        elif difference is None:
            self._early.remember(message)

    def on_renew(self, message: m.Renew) -> None:
        for transfer_id in message.transfer_ids:
            for offer in self._offers.named(transfer_id):
                if offer.finished:
                    self._start_lease(offer)

    def on_sent(self, session: Session, event: Event) -> None:
        """SENT events of open sessions."""
        known = self.posts.end(session, event)
        if known is None:
            return
        offer, stream = known
        if event.status in (Status.BEYOND_END, Status.OUT_OF_BOUNDS) and stream.by_lanes:
            self._broken(offer, stream, Reason(refusal_code(event.status), event.why))
        elif event.status == Status.NOT_CONVERTED:
            self._broken(offer, stream, Reason(Code.CONVERSION, event.why))
        elif event.status != Status.OK:
            self._broken(offer, stream, Reason(Code.SEND_FAILED, event.why))
        elif offer.is_serving(stream) and stream.delivered:
            self._delivered(offer, stream)

    def on_closed(self, session: Session, why: str) -> None:
        self._early.on_closed(session, why)
        for offer in self._offers:
            for stream in [s for s in offer.streams.values() if s.session is session]:
                self._served(offer, stream, Reason(Code.SESSION_LOST, why))

    # -- inside

    def _late(self, stream: Stream, why: Reason) -> None:
        """It waited in vain for an offer of its own; one that others fetch still holds what it needs."""
        offer = self._offers.find_for(stream.request).offer
        if offer is None:
            stream.fail(why)
        else:
            self._attach(offer, stream)

    def _attach(self, offer: Offer, stream: Stream) -> None:
        """Begin to serve a stream; one that waited for the offer holds its session already."""
        if stream.timer is None:
            stream.session.hold()
        else:
            stream.timer.cancel()
        if stream.generation in offer.streams:
            stream.fail(Reason(Code.BAD_SELECTION, f"generation: {stream.generation} is another session's"))
            stream.session.drop()
            return
        offer.streams[stream.generation] = stream
        offer.peer = stream.session.label
        stream.begun_at = time.monotonic()
        self._offers.begin(stream.session, stream.generation, offer)
        self._guarded(offer, stream, self._serve)

    def _serve(self, offer: Offer, stream: Stream) -> None:
        """Raises ValueError for what can't be had."""
        peer, request = stream.session.peer, stream.request
        if offer.only_for and (peer is None or peer.engine_id != offer.only_for):
            raise SelectionError(f"this transfer is offered to engine {offer.only_for} only")
        offer.expected = max(offer.expected, request.consumers)
        if isinstance(request, m.SubscribeParts):
            ends = partial(self._post, offer, stream), partial(self._broken, offer, stream)
            stream.part = part_sender(request, offer.source, stream.session, self._converters, *ends)
        else:
            stream.cursor = offer.source.cursor(request.selection, request.nbytes)
        if offer.lease is not None:
            offer.lease.cancel()
        late = (offer, stream, Reason(Code.DEADLINE, "the subscription's time is over"))
        stream.timer = self._loop.call_later(request.timeout_ms / 1000, self._broken, *late)
        backend, cursor = stream.session.backend, stream.cursor
        if stream.part is not None:
            stream.by_lanes = True
            stream.part.start()
        elif isinstance(cursor, PagedCursor) and backend.capabilities.pages:
            stream.by_lanes = True
            lanes = cast(PagedBackend, backend)
            self._post(offer, stream, partial(lanes.post_pages, cursor=cursor.lanes))
        else:
            self._pump(offer, stream)

    def _guarded(self, offer: Offer, stream: Stream, step: Callable[[Offer, Stream], None]) -> None:
        """A fault in one stream ends that one."""
        try:
            step(offer, stream)
        except ValueError as error:
            self._broken(offer, stream, refusal(error))
        except Exception as error:
            logger.exception("%s: transfer %s failed", stream.session.label, stream.transfer_id)
            self._broken(offer, stream, fault(error))

    def _pump(self, offer: Offer, stream: Stream) -> None:
        assert stream.cursor is not None
        descriptors = stream.cursor.take_ready()
        if descriptors is not None:
            self._post(offer, stream, partial(stream.session.backend.post, descriptors=descriptors))

    def _post(self, offer: Offer, stream: Stream, post: Callable[..., int]) -> None:
        try:
            self.posts.begin(offer, stream, post)
        except (OSError, ValueError) as error:
            self._broken(offer, stream, Reason(Code.POST, str(error)))

    def _broken(self, offer: Offer, stream: Stream, why: Reason) -> None:
        """Its consumer won't get what it needs. Nothing happens if it is served no more."""
        if offer.is_serving(stream):
            stream.fail(why)
            self._served(offer, stream, why)

    def _detach(self, offer: Offer, stream: Stream) -> None:
        if offer.streams.pop(stream.generation, None) is not None:
            stream.stop()

    def _delivered(self, offer: Offer, stream: Stream) -> None:
        offer.keep_stats(stream)
        self._served(offer, stream)

    def _served(self, offer: Offer, stream: Stream, trouble: Reason | None = None) -> None:
        """One consumer has all it wanted, or won't get it (``trouble``): end its stream."""
        offer.trouble = offer.trouble or trouble
        self._detach(offer, stream)
        offer.served.add(stream.generation)
        self._offers.end(stream.session, stream.generation)
        if not offer.done and offer.finished and not offer.streams:
            self._start_lease(offer)
        self._release_if_done(offer)

    def _release_if_done(self, offer: Offer) -> None:
        if offer.done:
            self._release(offer, offer.trouble)

    def _release(self, offer: Offer, why: Reason | None) -> None:
        report, offer.on_released = offer.on_released, None
        self._offers.remove(offer)
        self._early.gone(offer, why.detail if why else "")
        if offer.lease is not None:
            offer.lease.cancel()
        if report is not None:
            report(offer.outcome(why))

    def _start_lease(self, offer: Offer) -> None:
        if offer.lease is not None:
            offer.lease.cancel()
        offer.lease = self._loop.call_later(self._lease_s, self._expired, offer)

    def _expired(self, offer: Offer) -> None:
        if not offer.streams:
            self.withdraw((offer.transfer_id,), Reason(Code.EXPIRED, "nobody fetched it within its lease"))
