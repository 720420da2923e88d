# SPDX-License-Identifier: Apache-2.0
"""One request's way, of a file: an exporter's ``/snapshot``, or spans of an OpenTelemetry collector.

Prefill and decode are joined by the trace, and by the transfer's id where they are not in the same one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sage_kv_connector.telemetry.reading.otlp_file import OtlpSpan, spans_of
from sage_kv_connector.telemetry.reading.sources import found_of
from sage_kv_connector.telemetry.recording.snapshot import Snapshot, TransferRecord, decode

MOST_BYTES = 256 << 20
#: What our spans and their attributes are called before the rest.
OURS = "sage_kvt."
TRANSFER = f"{OURS}transfer_id"
CODE = f"{OURS}code"
OK = ("", "ok")
#: What a collector writes into the same file for other signals.
OTHER_SIGNALS = ("resourceMetrics", "resourceLogs", "resourceProfiles")


class Moment(msgspec.Struct, frozen=True):
    """Something that happened in a step. ``at``: seconds since the way began."""

    name: str
    at: float


class Step(msgspec.Struct, frozen=True):
    """``at`` and ``seconds`` of a span or a stage; ``depth`` in the tree; ``of``: the engine or service.

    ``code``: how it failed, "" if it did not.
    """

    name: str
    at: float
    seconds: float
    depth: int = 0
    of: str = ""
    code: str = ""
    detail: str = ""
    attributes: dict[str, str] = {}
    moments: tuple[Moment, ...] = ()


class Way(msgspec.Struct, frozen=True):
    """``transfer``: its id, "" of a trace in which nothing of ours is. ``began``: since 1970. Parents come first."""

    transfer: str
    began: float
    traces: tuple[str, ...]
    steps: tuple[Step, ...]


def way_of_file(path: Path, transfer: str = "") -> Way:
    """The way of a transfer; by default of the newest that failed, else of the newest.

    Raises ValueError naming the field that is wrong, or the transfer that is not there; OSError without a file.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: more than {MOST_BYTES} bytes")
    try:
        whole = _object(data)
    except ValueError:
        whole = None  # one object a line, or nothing of the kind
    if whole is not None and "engines" in whole:
        return _way_of_records(found_of(data).snapshots, transfer, path)
    if whole is not None and "samples" in whole:
        return _way_of_records([decode(data)], transfer, path)
    spans: list[tuple[str, OtlpSpan]] = []
    lines = [(1, data)] if whole is not None else enumerate(data.splitlines(), 1)
    for number, line in lines:
        if not line.strip():
            continue
        try:
            found = _object(line)
            if "resourceSpans" in found:
                spans += spans_of(line)
            elif not any(name in found for name in OTHER_SIGNALS):
                raise ValueError("no field resourceSpans (a collector's traces) or engines (/snapshot)")
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
    return _way_of_spans(spans, transfer, path)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}, must be an object")
    return found


# -- records of a snapshot


def _way_of_records(snapshots: Sequence[Snapshot], transfer: str, path: Path) -> Way:
    records = [(f"{now.engine}[{now.rank}]", one) for now in snapshots for one in now.transfers]
    if not records:
        raise ValueError(f"{path}: engines: none of {len(snapshots)} has a transfer")
    if not transfer:
        newest = max(records, key=lambda one: (one[1].code not in OK, one[1].began + one[1].seconds))
        transfer = newest[1].transfer_id
    of_it = [(who, one) for who, one in records if one.transfer_id == transfer]
    if not of_it:
        raise _unknown(path, transfer, (one.transfer_id for _, one in records))
    of_it.sort(key=lambda one: one[1].began)
    began = of_it[0][1].began
    steps = [step for who, one in of_it for step in _steps(who, one, began)]
    traces = tuple(dict.fromkeys(one.trace for _, one in of_it if one.trace))
    return Way(transfer, began, traces, tuple(steps))


def _steps(who: str, record: TransferRecord, began: float) -> Iterable[Step]:
    at = record.began - began
    failed = record.code not in OK
    yield Step(
        record.side,
        at,
        record.seconds,
        of=who,
        code=record.code if failed else "",
        detail=record.detail,
        attributes={
            name: str(value)
            for name, value in (
                ("peer", record.peer),
                ("backend", record.backend),
                ("wire_dtype", record.wire_dtype),
                ("bytes", record.nbytes),
            )
            if value
        },
    )
    for number, (stage, seconds) in enumerate(record.stages, 1):
        ended_it = failed and number == len(record.stages)
        yield Step(stage, at, seconds, 1, code=record.code if ended_it else "")
        at += seconds


# -- spans


def _way_of_spans(spans: Sequence[tuple[str, OtlpSpan]], transfer: str, path: Path) -> Way:
    if not spans:
        raise ValueError(f"{path}: resourceSpans: no span in it")
    if transfer:
        if not any(span.named.get(TRANSFER) == transfer for _, span in spans):
            known = (span.named[TRANSFER] for _, span in spans if TRANSFER in span.named)
            raise _unknown(path, transfer, known)
        traces = {span.trace_id for _, span in spans if span.named.get(TRANSFER) == transfer}
    else:
        newest = max((span for _, span in spans), key=lambda span: (*_worth(span), span.end_time_unix_nano))
        transfer = newest.named.get(TRANSFER, "")
        traces = {newest.trace_id} | {
            span.trace_id for _, span in spans if transfer and span.named.get(TRANSFER) == transfer
        }
    of_it = {(span.trace_id, span.span_id): (who, span) for who, span in spans if span.trace_id in traces}
    began = min(span.start_time_unix_nano for _, span in of_it.values())
    steps = [_step(*of_it[key], depth, began) for key, depth in _tree(of_it)]
    return Way(transfer, began / 1e9, tuple(sorted(traces)), tuple(steps))


def _worth(span: OtlpSpan) -> tuple[bool, bool]:
    """Failed ones of ours first, then ours."""
    ours = span.name.startswith(OURS) or any(one.key.startswith(OURS) for one in span.attributes)
    return ours and bool(_code(span)), ours


def _code(span: OtlpSpan) -> str:
    code = span.named.get(CODE, "")
    return code if code not in OK else ("error" if span.failed else "")


_Key = tuple[str, str]


def _tree(spans: dict[_Key, tuple[str, OtlpSpan]]) -> Iterable[tuple[_Key, int]]:
    """Keys with their depth, children behind their parent, in the order in which they began.

    A span whose parent is not there is a root; of spans that are each other's parents the first one is.
    """
    children: dict[_Key | None, list[_Key]] = {}
    for key in sorted(spans, key=lambda key: (_start(spans, key), -spans[key][1].end_time_unix_nano)):
        parent = (key[0], spans[key][1].parent_span_id)
        children.setdefault(parent if parent in spans else None, []).append(key)
    left = dict.fromkeys(sorted(spans, key=lambda key: _start(spans, key)))
    roots = children.get(None, [])
    while left:
        stack = [(key, 0) for key in reversed(roots)] or [(next(iter(left)), 0)]
        roots = []
        while stack:
            key, depth = stack.pop()
            if key in left:
                del left[key]
                yield key, depth
                stack += [(child, depth + 1) for child in reversed(children.get(key, []))]


def _start(spans: dict[_Key, tuple[str, OtlpSpan]], key: _Key) -> int:
    return spans[key][1].start_time_unix_nano


def _step(who: str, span: OtlpSpan, depth: int, began: int) -> Step:
    return Step(
        span.name,
        (span.start_time_unix_nano - began) / 1e9,
        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        depth,
        who,
        _code(span),
        span.status.message,
        {name.removeprefix(OURS): text for name, text in span.named.items() if name.startswith(OURS)},
        tuple(Moment(one.name, (one.time_unix_nano - began) / 1e9) for one in span.events),
    )


def _unknown(path: Path, transfer: str, known: Iterable[str]) -> ValueError:
    found = list(dict.fromkeys(known))
    newest = ", ".join(found[-5:]) or "none"
    return ValueError(
        f"transfer is {transfer!r}, which {path} does not have; allowed: one of {len(found)}, such as {newest}"
    )
