# SPDX-License-Identifier: Apache-2.0
"""Which trace a hand-over belongs to, as W3C Trace Context has it (``traceparent``), and where it is found.

A request brings a context in its headers or its parameters. Where none reached us prefill and decode make the same one
of the transfer's name, which both know: so they are joined all the same.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from sage_kv_connector.contract.bootstrap_room import pages_of

#: What headers and ``kv_transfer_params`` call it.
TRACEPARENT = "traceparent"
#: Later versions may add fields behind these; no more of them is taken than this many characters.
MAX_TRACEPARENT = 512
_VERSION_0 = 55
_FIELDS = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 1
_TAG = b"sage_kvt trace 1\0"


class TraceContext(NamedTuple):
    """A span: 32 and 16 lower-case hexadecimal digits, neither all 0. ``sampled``: its trace is kept."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @property
    def text(self) -> str:
        """The value of a ``traceparent`` header."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def parse_traceparent(given: object) -> TraceContext | None:
    """What a client or a router sent; None for anything that the specification does not allow."""
    if not isinstance(given, str) or len(given) > MAX_TRACEPARENT:
        return None
    found = _FIELDS.match(given)
    if found is None:
        return None
    version, trace_id, span_id, flags = found.groups()
    rest = given[_VERSION_0:]
    if version == "ff" or (rest and (version == "00" or not rest.startswith("-"))):
        return None
    if not (int(trace_id, 16) and int(span_id, 16)):
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def offer_trace(request: TraceContext | None, name: str, rank: int = 0) -> TraceContext:
    """The span of the offer that goes by ``name`` at a rank of prefill.

    ``request``: the context that its request brought; without one the trace is made of the name, and what is
    offered beside a room's pages is in their trace.
    """
    trace_id = request.trace_id if request else _digest(pages_of(name))[:32]
    span_id = _digest(f"{trace_id} {rank} {name}")[:16]
    return TraceContext(trace_id, span_id, request.sampled if request else True)


def _digest(text: str) -> str:
    return hashlib.sha256(_TAG + text.encode(errors="surrogatepass")).hexdigest()
