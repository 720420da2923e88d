# SPDX-License-Identifier: Apache-2.0
"""A small OTLP/HTTP receiver, read by OpenTelemetry's own protobuf classes: what real servers export, span by span."""

from __future__ import annotations

import base64
import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Collected(NamedTuple):
    """One span. Ids in hexadecimal digits, "" for no parent; times in nanoseconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    kind: str
    links: tuple[str, ...]
    begins: int
    ends: int
    events: tuple[tuple[str, int], ...]
    attributes: dict[str, Any]
    resource: dict[str, Any]
    error: str


class TraceCollector:
    """Listens on loopback until ``close``."""

    def __init__(self) -> None:
        self._requests: list[ExportTraceServiceRequest] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self, trace_id: str = "", name: str = "") -> list[Collected]:
        """What arrived so far, by its beginning: of one trace, or of one name."""
        found = [
            _collected(span, resource.resource)
            for request in list(self._requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return sorted(
            (span for span in found if trace_id in ("", span.trace_id) and name in ("", span.name)),
            key=lambda span: span.begins,
        )

    def as_json(self, trace_id: str) -> dict[str, Any]:
        """One trace as OTLP's JSON."""
        resources = []
        for request in list(self._requests):
            for resource in MessageToDict(request).get("resourceSpans", ()):
                for scope in resource["scopeSpans"]:
                    scope["spans"] = [
                        span for span in map(_hexadecimal, scope["spans"]) if span["traceId"] == trace_id
                    ]
                resource["scopeSpans"] = [scope for scope in resource["scopeSpans"] if scope["spans"]]
                if resource["scopeSpans"]:
                    resources.append(resource)
        return {"resourceSpans": resources}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        requests = self._requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if self.path == "/v1/traces":
                    requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _hexadecimal(span: dict[str, Any]) -> dict[str, Any]:
    """Protobuf's JSON has base64 where OTLP's has hexadecimal digits."""
    for field in ("traceId", "spanId", "parentSpanId"):
        if field in span:
            span[field] = base64.b64decode(span[field]).hex()
    for link in span.get("links", ()):
        _hexadecimal(link)
    return span


def _collected(span: Any, resource: Any) -> Collected:
    return Collected(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        type(span).SpanKind.Name(span.kind),
        tuple(link.span_id.hex() for link in span.links),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        tuple((event.name, event.time_unix_nano) for event in span.events),
        _attributes(span.attributes),
        _attributes(resource.attributes),
        span.status.message if span.status.code == 2 else "",
    )


def _attributes(found: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in found}
