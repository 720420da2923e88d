# SPDX-License-Identifier: Apache-2.0
"""The prefill side: what is on offer is posted to who subscribed, and its memory freed when all are served.

Life of an offer: ``offer`` (prefill began) → its source grows, and ``pump`` where lanes don't see that → ``finish``
(prefill ended; the lease runs unless a consumer is being served) → ``on_released`` exactly once, after which nothing
reads its memory. A subscription may come before the offer (concurrent dispatch); it waits (``early.py``).
Control thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from functools import partial

from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.conversion.converters import Converters
from sage_kv_connector.engine.pages.source import SelectionError, Source
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session, is_same_peer, owner_of
from sage_kv_connector.engine.transfer import timeline
from sage_kv_connector.engine.transfer.early import BUSY_S, NOT_IN_TIME, Early
from sage_kv_connector.engine.transfer.offer import NO_TERMS, Offer, OfferTerms, OnReleased, Stream
from sage_kv_connector.engine.transfer.offer_table import OfferTable
from sage_kv_connector.engine.transfer.posts import Posts
from sage_kv_connector.engine.transfer.returns import Returns
from sage_kv_connector.telemetry.recording.recorder import Recorder

logger = logging.getLogger(__name__)

#: Subscriptions of one peer that are served at a time; a decode server has some hundred requests.
MAX_STREAMS_A_PEER = 2048


class Producer:
    """All offers of one engine. ``converters``: None where its cache can't be converted."""

    def __init__(
        self, loop: ControlLoop, config: KVTransportConfig, converters: Converters | None, recorder: Recorder
    ) -> None:
        self._loop = loop
        self._recorder = recorder
        self._lease_s = config.lease_s
        self._ended: Reason | None = None  #: why nothing begins any more
        self._offers = OfferTable()
        self._early = Early(loop, config.unmatched_timeout_s, self._late)
        self._returns = Returns(loop, config.lease_s)
        self.posts = Posts(converters, self._broken)

    def __len__(self) -> int:
        return len(self._offers) + len(self._early)

    # -- the engine's side

    def offer(
        self, transfer_id: str, source: Source, on_released: OnReleased, terms: OfferTerms = NO_TERMS
    ) -> None:
        """Put a transfer on offer. An id that is on offer already is released at once, with that reason."""
        offer = Offer(transfer_id, source, on_released, terms)
        if self._offers.get(transfer_id) is not None:
            twice = Reason(Code.DUPLICATE, f"transfer_id {transfer_id!r} is on offer already")
            on_released(offer.outcome(twice))
            return
        if self._ended is not None:
            on_released(offer.outcome(self._ended))
            return
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
            for stream in [s for s in offer.streams.values() if not s.by_lanes]:
                self.posts.guarded(offer, stream, self.posts.pump)

    def is_streaming(self, transfer_id: str) -> bool:
        return (offer := self._offers.get(transfer_id)) is not None and bool(offer.streams)

    def must_pump(self, transfer_id: str) -> bool:
        """Whether some stream waits for ``pump``; any thread may ask, after it changed the source."""
        offer = self._offers.get(transfer_id)
        return offer is not None and offer.must_pump

    def finish(self, transfer_id: str) -> None:
        """Nothing more becomes ready; from now on the memory is only held for consumers."""
        offer = self._offers.get(transfer_id)
        if offer is None:
            return
        offer.finished, offer.finished_at = True, time.monotonic()
        self.pump(transfer_id)
        self._start_lease(offer)
        self._release_if_done(offer)

    def withdraw(self, transfer_ids: Iterable[str], why: Reason) -> None:
        """End offers now: revoke what is in flight and tell their consumers why."""
        for transfer_id in transfer_ids:
            if (offer := self._offers.get(transfer_id)) is not None:
                for stream in list(offer.streams.values()):
                    stream.fail(why)
                    offer.told(self._recorder.ended(timeline.outgoing(offer, stream, why)))
                    self._detach(offer, stream)
                    # It computes the prompt itself now: an offer of the same id is not for it.
                    self._early.remember(stream.release(why.detail), stream.owner)
                self._release(offer, why)

    def give_up(self, transfer_ids: Iterable[str], why: Reason) -> None:
        """Like ``withdraw``, and whoever subscribes to them from now on is told at once."""
        for transfer_id in transfer_ids:
            self.withdraw((transfer_id,), why)
            self._early.give_up(transfer_id, why)

    def close(self, why: Reason) -> None:
        """Every offer ends, and each that comes."""
        self._ended = why
        self._early.close(why)
        self.withdraw([o.transfer_id for o in self._offers], why)
        self._returns.close()

    # -- the peers' side

    def on_subscribe(self, session: Session, request: m.Subscribe | m.SubscribeParts) -> None:
        stream = Stream(session, request)
        if (refusal := stream.refusal) is not None:
            stream.fail(refusal)
            return
        generation = request.generation
        if self._offers.of_consumer(session, generation) or self._offers.has_ended(session, generation):
            stream.fail(Reason(Code.BAD_SELECTION, f"generation: {generation} was subscribed already"))
            return
        if self._offers.streams_of(stream.owner) >= MAX_STREAMS_A_PEER:
            busy = Reason(Code.BUSY, f"{MAX_STREAMS_A_PEER} subscriptions of this peer are being served")
            stream.fail(busy, again_s=BUSY_S)
            return
        if request.replaces:
            self._replace(session, request.replaces)
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

    def on_release(self, session: Session, message: m.Release) -> None:
        offer, difference = self._offers.find(message.transfer_id, message.prompt, message.consumers)
        if offer is not None:
            offer.decline(message)
            self._release_if_done(offer)
        elif difference is None:
            self._early.remember(message, owner_of(session))

    def on_renew(self, message: m.Renew) -> None:
        for offer in [o for name in message.transfer_ids for o in self._offers.named(name) if o.finished]:
            self._start_lease(offer)

    def on_sent(self, session: Session, event: Event) -> None:
        """SENT events of open sessions."""
        known = self.posts.end(session, event)
        if known is None:
            return
        offer, stream = known
        if event.status == Status.CONNECTION_LOST:
            return  # the session says so a moment later, and its consumer may come back
        if (trouble := stream.trouble(event)) is not None:
            self._broken(offer, stream, trouble)
        else:
            stream.moved(event)
            if offer.is_serving(stream) and stream.delivered:
                self._delivered(offer, stream)

    def on_closed(self, session: Session, why: str) -> None:
        lost = Reason(Code.SESSION_LOST, why)
        for stream in self._early.take_lost(session):
            left = stream.release(f"the session was lost: {why}")
            self._returns.wait(stream, partial(self.on_release, stream.session, left))
        for offer in self._offers:
            for stream in [s for s in offer.streams.values() if s.session is session]:
                self._leave(offer, stream)
                offer.away.append(stream.generation)
                self._returns.wait(stream, partial(self._stays_away, offer, stream, lost))

    # -- inside

    def _late(self, stream: Stream, why: Reason) -> None:
        """It waited in vain for an offer of its own; one that others fetch still holds what it needs."""
        offer = self._offers.find_for(stream.request).offer
        if offer is not None:
            self._attach(offer, stream)
            return
        stream.fail(why)
        if why is NOT_IN_TIME:  # an offer that comes after all is not for it
            self._early.remember(stream.release(why.detail), stream.owner)

    def _replace(self, session: Session, generation: int) -> None:
        """A consumer is back over a new session, be it before the loss of the old one was noticed here."""
        self._returns.came_back(session, generation)
        self._early.replaced(session, generation)
        for offer in self._offers:
            old = offer.streams.get(generation)
            if old is not None and is_same_peer(old.session, session):
                self._leave(offer, old)

    def _leave(self, offer: Offer, stream: Stream) -> None:
        """Its consumer is away, and may come back."""
        self._detach(offer, stream)
        if offer.finished and not offer.streams:
            self._start_lease(offer)

    def _stays_away(self, offer: Offer, stream: Stream, why: Reason) -> None:
        offer.trouble = offer.trouble or why
        offer.told(self._recorder.ended(timeline.outgoing(offer, stream, why)))
        offer.served.add(stream.generation)
        self._release_if_done(offer)

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
        self.posts.guarded(offer, stream, self._serve)

    def _serve(self, offer: Offer, stream: Stream) -> None:
        """Raises ValueError for what can't be had."""
        peer, request = stream.session.peer, stream.request
        if offer.only_for and (peer is None or peer.engine_id != offer.only_for):
            raise SelectionError(f"this transfer is offered to engine {offer.only_for} only")
        offer.expected = max(offer.expected, request.consumers)
        self.posts.prepare(offer, stream)
        if offer.lease is not None:
            offer.lease.cancel()
        late = Reason(Code.DEADLINE, "the subscription's time is over")
        stream.timer = self._loop.call_later(request.timeout_ms / 1000, self._broken, offer, stream, late)
        self.posts.start(offer, stream)

    def _broken(self, offer: Offer, stream: Stream, why: Reason) -> None:
        """Its consumer won't get what it needs. Nothing happens if it is served no more."""
        if offer.is_serving(stream):
            stream.fail(why)
            self._served(offer, stream, why)

    def _detach(self, offer: Offer, stream: Stream) -> None:
        if offer.streams.pop(stream.generation, None) is not None:
            self._offers.end(stream.session, stream.generation)
            stream.stop()

    def _delivered(self, offer: Offer, stream: Stream) -> None:
        if offer.stats is None:
            self._recorder.handed_over(offer.prompt)
        offer.keep_stats(stream)
        self._served(offer, stream)

    def _served(self, offer: Offer, stream: Stream, trouble: Reason | None = None) -> None:
        """One consumer has all it wanted, or won't get it (``trouble``): end its stream."""
        offer.trouble = offer.trouble or trouble
        offer.told(self._recorder.ended(timeline.outgoing(offer, stream, trouble)))
        self._detach(offer, stream)
        offer.served.add(stream.generation)
        if not offer.done and offer.finished and not offer.streams:
            self._start_lease(offer)
        self._release_if_done(offer)

    def _release_if_done(self, offer: Offer) -> None:
        if offer.done:
            self._release(offer, offer.trouble)

    def _release(self, offer: Offer, why: Reason | None) -> None:
        report, offer.on_released = offer.on_released, None
        if report is None:
            return
        self._returns.end(offer.away)
        self._offers.remove(offer)
        self._early.gone(offer, why.detail if why else "")
        if offer.lease is not None:
            offer.lease.cancel()
        held = timeline.held(offer, why)
        if self._recorder.released(held, fetched=why is None or bool(offer.served)):
            offer.told(held)
        report(offer.outcome(why))

    def _start_lease(self, offer: Offer) -> None:
        if offer.lease is not None:
            offer.lease.cancel()
        offer.lease = self._loop.call_later(self._lease_s, self._expired, offer)

    def _expired(self, offer: Offer) -> None:
        if not offer.streams:
            self.withdraw((offer.transfer_id,), Reason(Code.EXPIRED, "nobody fetched it within its lease"))
