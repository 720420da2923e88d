# SPDX-License-Identifier: Apache-2.0
"""Spans to an OpenTelemetry collector, by the official SDK: OTLP over HTTP, in batches, on the SDK's own thread.

What else the SDK can do is set by its own variables: ``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``,
``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_EXPORTER_OTLP_CERTIFICATE``, ``OTEL_BSP_*``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit, urlunsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from sage_kv_connector.contract.trace import TraceContext
from sage_kv_connector.telemetry.recording.spans import LOAD, OFFER, Span

#: Where a collector takes spans, below an endpoint that names no path.
PATH = "/v1/traces"
_KINDS = {OFFER: SpanKind.PRODUCER, LOAD: SpanKind.CONSUMER}


class OtlpSink:
    """``processor``: what gets the spans, in place of one that sends them to ``endpoint``."""

    def __init__(
        self, endpoint: str, engine_id: str, rank: int, processor: SpanProcessor | None = None
    ) -> None:
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            resource=_resource(engine_id, rank), id_generator=self._ids, shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            processor or BatchSpanProcessor(OTLPSpanExporter(endpoint=traces_url(endpoint)))
        )
        self._tracer = self._provider.get_tracer("sage_kv_connector")

    def keeps(self, trace_id: str) -> bool:
        """What the SDK's sampler says of a trace that begins."""
        return _keeps(self._provider, trace_id)

    def send(self, span: Span) -> None:
        context = Context()
        if span.parent is not None:
            context = set_span_in_context(NonRecordingSpan(_context(span.parent)), context)
        self._ids.give(span.own)
        made = self._tracer.start_span(
            span.name,
            context,
            _KINDS.get(span.name, SpanKind.INTERNAL),
            dict(span.attributes),
            [Link(_context(span.link))] if span.link is not None else [],
            _nanoseconds(span.began),
        )
        for event in span.events:
            made.add_event(event.name, dict(event.attributes), _nanoseconds(event.at))
        if span.code:
            made.set_attribute("error.type", span.code)
            made.set_status(Status(StatusCode.ERROR, f"{span.code}: {span.detail}"))
        made.end(_nanoseconds(span.ended))

    def close(self) -> None:
        self._provider.shutdown()


def sampling() -> Callable[[str], bool]:
    """The same without anything that is sent."""
    return partial(_keeps, TracerProvider(shutdown_on_exit=False))


def _keeps(provider: TracerProvider, trace_id: str) -> bool:
    return provider.sampler.should_sample(None, int(trace_id, 16), OFFER).decision is not Decision.DROP


def traces_url(endpoint: str) -> str:
    """Where spans go: the endpoint itself if it names a path."""
    parts = urlsplit(endpoint)
    return endpoint if parts.path.strip("/") else urlunsplit(parts._replace(path=PATH))


class _GivenIds(IdGenerator):
    """Ids that were given for the next span, else random ones of the system.

    The SDK's own take Python's ``random``, which engines seed alike in all their processes.
    """

    def __init__(self) -> None:
        self._own: TraceContext | None = None

    def give(self, own: TraceContext | None) -> None:
        self._own = own

    def generate_span_id(self) -> int:
        return int(self._own.span_id, 16) if self._own else secrets.randbits(64) or 1

    def generate_trace_id(self) -> int:
        return int(self._own.trace_id, 16) if self._own else secrets.randbits(128) or 1


def _context(trace: TraceContext) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), True, flags)


def _resource(engine_id: str, rank: int) -> Resource:
    """The SDK's own, of the environment too, and which engine this is."""
    own: dict[str, str | int] = {SERVICE_INSTANCE_ID: engine_id, "sage_kvt.rank": rank}
    resource = Resource.create(own)
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "sage_kvt"}))
    return resource


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
