# SPDX-License-Identifier: Apache-2.0
"""Which trace a request of vLLM's belongs to.

Its headers say so, which vLLM passes on when it has an endpoint of its own (``--otlp-traces-endpoint``), or else
``traceparent`` among its ``kv_transfer_params``: given to prefill by a client or a router, to decode by prefill's
answer. What is no W3C context is as good as none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sage_kv_connector.contract.trace import TRACEPARENT, TraceContext, offer_trace, parse_traceparent
from sage_kv_connector.telemetry.recording.spans import open_sampling


class LoadTrace(NamedTuple):
    """``request``: what the load is part of. ``offer``: prefill's, where the request brought a context beside it."""

    request: TraceContext | None = None
    offer: TraceContext | None = None


NO_TRACE = LoadTrace()


class RequestTraces:
    """Of the scheduler's half; says nothing unless spans are ``on``."""

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._keeps = open_sampling() if on else None

    def of_request(self, request: Any) -> TraceContext | None:
        """The context that a request brought."""
        return (_in_headers(request) or _in_params(request)) if self._on else None

    def of_load(self, request: Any) -> LoadTrace:
        """The same on decode, where the parameters' one is that of prefill's offer."""
        if not self._on:
            return NO_TRACE
        headers, params = _in_headers(request), _in_params(request)
        return LoadTrace(headers, params) if headers else LoadTrace(params)

    def params(self, request: TraceContext | None, offered_as: str) -> dict[str, str]:
        """For decode's request, of a prefill whose request brought this context and whose offer goes by this name."""
        if self._keeps is None:
            return {}
        offer = offer_trace(request, offered_as)
        if request is None:
            offer = offer._replace(sampled=self._keeps(offer.trace_id))
        return {TRACEPARENT: offer.text}


def _in_headers(request: Any) -> TraceContext | None:
    headers = getattr(request, "trace_headers", None)
    return parse_traceparent(headers.get(TRACEPARENT)) if isinstance(headers, Mapping) else None


def _in_params(request: Any) -> TraceContext | None:
    return parse_traceparent((request.kv_transfer_params or {}).get(TRACEPARENT))
