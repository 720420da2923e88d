# SPDX-License-Identifier: Apache-2.0
"""Hand-overs between two engines as spans: who is inside whom, in what order, and what a failure leaves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec
import pytest

pytest.importorskip("opentelemetry.sdk.trace")


from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from sage_kv_connector.contract.bootstrap_room import metadata_transfer, pages_transfer
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.trace import TraceContext, offer_trace
from sage_kv_connector.engine import core as core_module
from sage_kv_connector.engine.transfer.offer import OfferTerms
from sage_kv_connector.telemetry.recording.otlp import OtlpSink
from sage_kv_connector.telemetry.recording.recorder import Recorder
from sage_kv_connector.telemetry.recording.snapshot import TransferRecord
from sage_kv_connector.telemetry.recording.spans import LOAD, OFFER, SEND, Spans, UnreachedLoad
from tests.engine.conftest import Cores, made_cores
from tests.engine.conftest import make_core as make_core
from tests.engine.paged_side import Side, eventually

REQUEST = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


class Exported:
    """What all engines of a test sent, once they are closed."""

    def __init__(self) -> None:
        self.exporters: list[InMemorySpanExporter] = []
        self.made: list[Spans] = []

    def open(self, endpoint: str | None, engine_id: str, rank: int) -> Spans:
        self.exporters.append(InMemorySpanExporter())
        processor = SimpleSpanProcessor(self.exporters[-1])
        sink = OtlpSink("http://127.0.0.1:4318", engine_id, rank, processor)
        self.made.append(Spans(sink, rank))
        return self.made[-1]

    def all(self) -> list[ReadableSpan]:
        for one in self.made:
            one.close()
        spans = [span for exporter in self.exporters for span in exporter.get_finished_spans()]
        return sorted(spans, key=lambda span: span.start_time or 0)

    def only(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.all() if span.name == name]
        return found


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    found = Exported()
    monkeypatch.setattr(core_module, "open_spans", found.open)
    return found


@pytest.fixture
def make(exported: Exported) -> Iterator[Cores]:
    yield from made_cores(backend="tcp", host="127.0.0.1", unmatched_timeout_s=0.3)


def handed_over(
    make: Cores, name: str = "t", terms: OfferTerms | None = None, **wanted: Any
) -> tuple[Side, Side]:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    prefill.prefilled(name, [1, 2, 3], terms or OfferTerms(trace=REQUEST))
    decode.subscribe(prefill, name, range(3), [4, 5, 6], **wanted)
    assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok
    return prefill, decode


def parent_of(span: ReadableSpan) -> int:
    return int(span.parent.span_id) if span.parent else 0


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def events_of(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


def test_one_trace_has_both_sides_inside_the_request(make: Cores, exported: Exported) -> None:
    prefill, decode = handed_over(make, trace=REQUEST, offer_trace=offer_trace(REQUEST, "t"))
    offer, send, load = (exported.only(name) for name in (OFFER, SEND, LOAD))
    assert {trace_of(span) for span in (offer, send, load)} == {REQUEST.trace_id}
    assert parent_of(offer) == parent_of(load) == int(REQUEST.span_id, 16)
    assert parent_of(send) == id_of(offer)
    assert [link.context.span_id for link in load.links] == [id_of(offer)] and not send.links
    assert (offer.kind, send.kind, load.kind) == (SpanKind.PRODUCER, SpanKind.INTERNAL, SpanKind.CONSUMER)
    for span, side in ((offer, prefill), (send, prefill), (load, decode)):
        assert span.status.status_code is StatusCode.UNSET
        assert span.resource.attributes["service.instance.id"] == side.core.engine_id
        assert span.resource.attributes["service.name"] == "sage_kvt"


def test_events_are_the_stages_in_order_within_their_span(make: Cores, exported: Exported) -> None:
    handed_over(make, trace=REQUEST)
    expected = {
        OFFER: ["prefill finished", "released"],
        SEND: ["subscribe", "offer", "first page", "last page", "report"],
        LOAD: ["subscribe", "first page", "last page", "report"],
    }
    for name, events in expected.items():
        span = exported.only(name)
        assert events_of(span) == events
        assert span.start_time and span.end_time
        times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
        assert all(a <= b + 1000 for a, b in pairwise(times)), "to a microsecond"
        stages = [(event.attributes or {}).get("sage_kvt.stage_seconds", 0.0) for event in span.events]
        seconds = sum(one for one in stages if isinstance(one, float))
        assert seconds == pytest.approx((span.end_time - span.start_time) / 1e9, abs=1e-5)
    offer, send = exported.only(OFFER), exported.only(SEND)
    assert send.end_time and offer.end_time and send.end_time <= offer.end_time + 1000


def test_attributes_name_the_transfer_and_what_it_moved(make: Cores, exported: Exported) -> None:
    prefill, decode = handed_over(make, trace=REQUEST)
    nbytes = sum(cache[[1, 2, 3]].nbytes for cache in prefill.cache)
    for name, peer in ((SEND, decode), (LOAD, prefill)):
        found = dict(exported.only(name).attributes or {})
        assert found == {
            "sage_kvt.transfer_id": "t",
            "sage_kvt.peer": f"{peer.core.engine_id}[0]",
            "sage_kvt.backend": "tcp",
            "sage_kvt.wire_dtype": "same",
            "sage_kvt.bytes": nbytes,
            "sage_kvt.code": "ok",
        }


def test_without_a_context_the_transfers_name_joins_both_sides(make: Cores, exported: Exported) -> None:
    handed_over(make, terms=OfferTerms())
    offer, send, load = (exported.only(name) for name in (OFFER, SEND, LOAD))
    assert offer.parent is None and parent_of(send) == parent_of(load) == id_of(offer)
    assert len({trace_of(span) for span in (offer, send, load)}) == 1


def test_a_family_is_what_decode_may_name(make: Cores, exported: Exported) -> None:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    prefill.prefilled("own", [1], OfferTerms(family="shared"))
    decode.subscribe(prefill, "shared", range(1), [4])
    assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok
    assert parent_of(exported.only(LOAD)) == id_of(exported.only(OFFER))


def test_what_is_offered_beside_a_rooms_pages_is_in_their_trace(make: Cores, exported: Exported) -> None:
    pages = pages_transfer(9)
    prefill, decode = handed_over(make, pages, OfferTerms())
    prefill.prefilled(metadata_transfer(pages), [1], OfferTerms())
    decode.subscribe(prefill, metadata_transfer(pages), range(1), [4])
    assert decode.outcomes.get(timeout=10).ok and prefill.released.get(timeout=10).ok
    spans = exported.all()
    assert len(spans) == 6 and len({trace_of(span) for span in spans}) == 1
    (first,) = [span for span in spans if span.parent is None]
    inside = [span for span in spans if span.name in (LOAD, OFFER) and span is not first]
    assert [parent_of(span) for span in inside] == [id_of(first)] * 3


def test_a_failed_hand_over_is_an_error_with_its_code_on_both_sides(make: Cores, exported: Exported) -> None:
    prefill, decode = Side(make(), 1), Side(make(), 2)
    prefill.offer("t", [1, 2, 3], OfferTerms(trace=REQUEST))
    decode.subscribe(prefill, "t", range(3), [4, 5, 6], trace=REQUEST)
    eventually(lambda: prefill.core.is_streaming("t"))
    prefill.core.withdraw(["t"], "preempted")
    assert not decode.outcomes.get(timeout=10).ok
    assert not prefill.released.get(timeout=10).ok
    for name in (OFFER, SEND, LOAD):
        span = exported.only(name)
        assert span.status.status_code is StatusCode.ERROR, name
        assert (
            span.attributes
            and span.attributes["error.type"] == span.attributes["sage_kvt.code"] == "withdrawn"
        )
        assert "preempted" in (span.status.description or "")
    assert events_of(exported.only(LOAD)) == ["subscribe", "failed"]
    assert events_of(exported.only(OFFER)) == ["released"], "it never finished"


def test_a_load_that_nobody_offers_is_an_error_alone(make: Cores, exported: Exported) -> None:
    decode = Side(make(), 2)
    decode.subscribe(Side(make(), 1), "t", range(3), [4, 5, 6], trace=REQUEST)
    assert not decode.outcomes.get(timeout=10).ok
    (load,) = exported.all()
    assert load.name == LOAD and load.attributes and load.attributes["error.type"] == "unknown_transfer"


def test_a_load_that_found_nobody_to_ask_is_an_error_in_its_trace(exported: Exported) -> None:
    recorder = Recorder(exported.open("", "engine", 0))
    recorder.unreached(
        UnreachedLoad("t", 0.5, Code.BOOTSTRAP, "no answer", REQUEST, offer_trace(REQUEST, "t"))
    )
    load = exported.only(LOAD)
    assert parent_of(load) == int(REQUEST.span_id, 16) and len(load.links) == 1
    assert events_of(load) == ["failed"] and load.status.description == "bootstrap: no answer"
    assert (
        load.start_time and load.end_time and load.end_time - load.start_time == pytest.approx(5e8, abs=1e3)
    )
    assert recorder.samples() == [], "it is no transfer"


def test_a_retry_is_an_event_of_its_load(exported: Exported, make_core: Cores) -> None:
    prefill, decode = Side(make_core(), 1), Side(make_core(), 2)
    source = prefill.offer("t", [3], OfferTerms(trace=REQUEST))
    decode.subscribe(prefill, "t", range(1), [1], trace=REQUEST)
    eventually(lambda: prefill.core.is_streaming("t"))
    for connection in list(prefill.backend()._ends):
        prefill.backend().close_connection(connection)
    prefill.ready("t", source, slice(None), 1)
    prefill.core.finish("t")
    assert decode.outcomes.get(timeout=5).ok and prefill.released.get(timeout=5).ok
    load = exported.only(LOAD)
    assert events_of(load) == ["retry", "subscribe", "first page", "last page", "report"]
    assert load.attributes and load.attributes["sage_kvt.retries"] == 1
    retry = load.events[0].attributes
    assert retry and retry["sage_kvt.code"] == "session_lost"
    assert load.status.status_code is StatusCode.UNSET
    assert parent_of(exported.only(SEND)) == id_of(exported.only(OFFER))


def test_an_offer_made_anew_is_another_span(make: Cores, exported: Exported) -> None:
    prefill = Side(make(), 1)
    for _ in range(2):
        prefill.offer("t", [1], OfferTerms(trace=REQUEST))
        prefill.core.withdraw(["t"], "preempted")
        assert prefill.released.get(timeout=10)
    offers = exported.all()
    assert len({id_of(span) for span in offers}) == 2
    assert {parent_of(span) for span in offers} == {int(REQUEST.span_id, 16)}


def test_a_trace_that_is_not_kept_has_no_spans(make: Cores, exported: Exported) -> None:
    unkept = REQUEST._replace(sampled=False)
    handed_over(make, terms=OfferTerms(trace=unkept), trace=unkept)
    assert exported.all() == []


@pytest.mark.parametrize("share", ["0.0", "0.5", "1.0"])
def test_a_sampler_keeps_whole_traces_or_nothing_of_them(
    exported: Exported, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", share)
    spans = exported.open("", "engine", 0)
    for number in range(64):
        for name in (OFFER, SEND, LOAD):
            spans.put(name, record(f"t{number}"))
    spans.close()
    by_trace: dict[str, int] = {}
    for span in exported.all():
        by_trace[trace_of(span)] = by_trace.get(trace_of(span), 0) + 1
    assert set(by_trace.values()) <= {3}
    kept = {"0.0": range(1), "0.5": range(10, 55), "1.0": range(64, 65)}[share]
    assert len(by_trace) in kept


def record(name: str) -> TransferRecord:
    return TransferRecord(name, "decode", "p[0]", "tcp", "same", 0, 1, 1, 0.0, 1.0, (("connect", 1.0),))


def test_a_span_that_can_not_be_made_stops_no_other(
    exported: Exported, caplog: pytest.LogCaptureFixture
) -> None:
    spans = exported.open("", "engine", 0)
    spans.put(LOAD, msgspec.structs.replace(record("bad"), began=float("nan")))
    spans.put(LOAD, record("good"))
    assert dict(exported.only(LOAD).attributes or {})["sage_kvt.transfer_id"] == "good"
    assert "transfer 'bad' has no span" in caplog.text


def test_engines_that_are_seeded_alike_make_different_spans(exported: Exported) -> None:
    for number in range(2):
        random.seed(0)  # as vLLM's workers do
        spans = exported.open("", "engine", 0)
        spans.put(LOAD, record(f"t{number}"))
        spans.close()
    assert len({id_of(span) for span in exported.all()}) == 2


def test_other_ranks_offers_are_inside_the_first_ones_trace(exported: Exported) -> None:
    for rank in range(2):
        exported.open("", "engine", rank).put(OFFER, record("t"))
    first, second = sorted(exported.all(), key=parent_of)
    assert first.parent is None and parent_of(second) == id_of(first) and id_of(first) != id_of(second)
