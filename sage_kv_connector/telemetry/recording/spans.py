# SPDX-License-Identifier: Apache-2.0
"""Hand-overs as OpenTelemetry spans, made of records of transfers that ended.

prefill: ``sage_kvt.offer`` (until its memory is free) ⊃ ``sage_kvt.send`` (what one consumer got of it)
decode:  ``sage_kvt.load`` (asked until landed), inside the request's own span, and linked to prefill's offer where
that is known; inside prefill's offer where the request brought no context.

The control thread puts records into a queue; a thread of its own makes spans of them, which the OpenTelemetry SDK
sends. What finds the queue full is dropped. Without an endpoint none of this is there.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from sage_kv_connector.contract.bootstrap_room import pages_of
from sage_kv_connector.contract.trace import TraceContext, offer_trace, parse_traceparent
from sage_kv_connector.telemetry.recording.snapshot import TransferRecord

logger = logging.getLogger(__name__)

OFFER, SEND, LOAD = "sage_kvt.offer", "sage_kvt.send", "sage_kvt.load"
#: Records that wait to become spans.
MAX_WAITING = 2048
#: Offers whose span ids are remembered: one that is on offer anew has another.
MAX_OFFERS = 4096
#: How long an engine that ends waits for its last spans to be sent.
CLOSE_S = 2.0

#: What happened when a stage of a span ended; others have the stage's name.
_MILESTONES = {
    (OFFER, "compute"): "prefill finished",
    (SEND, "wait"): "offer",
    (SEND, "queue"): "first page",
    (SEND, "wire"): "last page",
    (LOAD, "connect"): "subscribe",
    (LOAD, "wait"): "first page",
    (LOAD, "wire"): "last page",
    (LOAD, "decode"): "converted",
}

Value = str | int | float


class UnreachedLoad(NamedTuple):
    """A load whose prefill could not be found. ``seconds``: it was looked for; it ends now."""

    transfer_id: str
    seconds: float
    code: str
    detail: str
    trace: TraceContext | None
    offer_trace: TraceContext | None

    def record(self) -> TransferRecord:
        return TransferRecord(
            transfer_id=self.transfer_id,
            side="decode",
            peer="",
            backend="",
            wire_dtype="",
            priority=0,
            nbytes=0,
            kv_bytes=0,
            began=time.time() - self.seconds,
            seconds=self.seconds,
            stages=(("resolve", self.seconds),),
            code=self.code,
            detail=self.detail,
            trace=self.trace.text if self.trace else "",
            link=self.offer_trace.text if self.offer_trace else "",
        )


class SpanEvent(NamedTuple):
    """``at``: seconds since 1970."""

    name: str
    at: float
    attributes: Mapping[str, Value]


class Span(NamedTuple):
    """A span that ended. ``own``: its context where that is known to others; ``parent``: None for a trace's first.

    ``began``, ``ended``: seconds since 1970. ``code``: a failure's, "" if all went well.
    """

    name: str
    own: TraceContext | None
    parent: TraceContext | None
    link: TraceContext | None
    began: float
    ended: float
    events: tuple[SpanEvent, ...]
    attributes: Mapping[str, Value]
    code: str
    detail: str


class SpanSink(Protocol):
    """Whoever sends spans on. One thread at a time."""

    def keeps(self, trace_id: str) -> bool:
        """Whether a trace that begins here is one to keep."""
        ...

    def send(self, span: Span) -> None: ...

    def close(self) -> None:
        """Send what waits."""
        ...


class Spans:
    """Of one engine. ``put`` is for any thread and never waits."""

    def __init__(self, sink: SpanSink, rank: int) -> None:
        self._sink = sink
        self._rank = rank
        self._offers: OrderedDict[str, None] = OrderedDict()
        self._waiting: queue.Queue[tuple[str, TransferRecord] | None] = queue.Queue(MAX_WAITING)
        self._closed = False
        self.dropped = 0  #: records that found the queue full
        self._thread = threading.Thread(target=self._work, name="sage-kvt-spans", daemon=True)
        self._thread.start()

    def put(self, name: str, record: TransferRecord) -> None:
        """Make a span of this name of a record."""
        try:
            self._waiting.put_nowait((name, record))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning("spans are dropped: %d wait already to be made", MAX_WAITING)

    def close(self) -> None:
        """Send what waits; a collector that does not take it is not waited for long. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("the last spans may be lost: they were not sent within %g s", CLOSE_S)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._sink.send(self._made(*item))
            except Exception:
                logger.exception("transfer %r has no span", item[1].transfer_id)
            if self._closed and self._waiting.empty():  # full when it was closed, it has no end mark
                break
        self._sink.close()

    def _made(self, name: str, record: TransferRecord) -> Span:
        own, parent, link = self._place(name, record)
        failed = "" if record.code == "ok" else str(record.code)
        return Span(
            name,
            own,
            parent,
            link,
            record.began,
            record.began + record.seconds,
            _events(name, record, failed),
            _attributes(record),
            failed,
            record.detail,
        )

    def _place(
        self, name: str, record: TransferRecord
    ) -> tuple[TraceContext | None, TraceContext | None, TraceContext | None]:
        """Own context, parent and link."""
        request, link = parse_traceparent(record.trace), parse_traceparent(record.link)
        named = record.family or record.transfer_id
        if name == OFFER:
            given = self._offer(request, named, self._rank)
            first = self._offer(None, pages_of(named))
            own = self._once(given)
            return own, request or (None if own == first else first), None
        if name == SEND:
            return None, self._offer(request, named, self._rank), None
        return None, request or self._offer(None, pages_of(named)), link

    def _offer(self, request: TraceContext | None, named: str, rank: int = 0) -> TraceContext:
        offer = offer_trace(request, named, rank)
        return offer if request else self._sampled(offer)

    def _sampled(self, first: TraceContext) -> TraceContext:
        """Of a trace that no router began: whether it is kept is decided here, on both sides alike."""
        return first._replace(sampled=self._sink.keeps(first.trace_id))

    def _once(self, own: TraceContext) -> TraceContext | None:
        if own.span_id in self._offers:
            return None
        self._offers[own.span_id] = None
        if len(self._offers) > MAX_OFFERS:
            self._offers.popitem(last=False)
        return own


def open_spans(endpoint: str | None, engine_id: str, rank: int) -> Spans | None:
    """Spans that go to a collector; None without one."""
    if endpoint is None:
        return None
    from sage_kv_connector.telemetry.recording.otlp import OtlpSink

    return Spans(OtlpSink(endpoint, engine_id, rank), rank)


def open_sampling() -> Callable[[str], bool]:
    """Whether a trace (by its id) that begins with an offer of ours is one to keep, for who only names it."""
    from sage_kv_connector.telemetry.recording.otlp import sampling

    return sampling()


def _events(name: str, record: TransferRecord, failed: str) -> tuple[SpanEvent, ...]:
    """Retries, which all are in the first stage, and the end of each stage."""
    events = [
        SpanEvent("retry", record.began + after, {"sage_kvt.code": str(code)})
        for after, code in record.retries
    ]
    if name == SEND:
        events.append(SpanEvent("subscribe", record.began, {}))
    at = record.began
    for place, (stage, seconds) in enumerate(record.stages, 1):
        at += seconds
        attributes: dict[str, Value] = {"sage_kvt.stage": stage, "sage_kvt.stage_seconds": seconds}
        milestone = _MILESTONES.get((name, stage), stage)
        if place == len(record.stages):
            milestone = "released" if name == OFFER else "failed" if failed else stage
        events.append(SpanEvent(milestone, at, attributes))
    return tuple(events)


def _attributes(record: TransferRecord) -> dict[str, Value]:
    found: dict[str, Value] = {
        "sage_kvt.transfer_id": record.transfer_id,
        "sage_kvt.peer": record.peer,
        "sage_kvt.backend": record.backend,
        "sage_kvt.wire_dtype": record.wire_dtype,
        "sage_kvt.code": str(record.code),
    }
    if record.backend:
        found["sage_kvt.bytes"] = record.nbytes
    if record.retries:
        found["sage_kvt.retries"] = len(record.retries)
    return {name: value for name, value in found.items() if value != ""}
