# SPDX-License-Identifier: Apache-2.0
"""The trace in the docs is one that servers exported: one root, everything inside it, both sides joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "trace.json"


def spans() -> list[dict[str, Any]]:
    return [
        span
        for resource in json.loads(DOCUMENT.read_text())["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]


def test_one_trace_has_a_request_and_both_sides_of_its_hand_over_inside() -> None:
    by_name = {span["name"]: span for span in spans()}
    assert {span["traceId"] for span in spans()} == {by_name["request"]["traceId"]}
    assert len({span["spanId"] for span in spans()}) == len(spans()) == 6
    root, offer = by_name["request"]["spanId"], by_name["sage_kvt.offer"]["spanId"]
    assert "parentSpanId" not in by_name["request"]
    parents = {span["name"]: span["parentSpanId"] for span in spans() if "parentSpanId" in span}
    assert parents == {
        "llm_request": root,
        "sage_kvt.offer": root,
        "sage_kvt.load": root,
        "sage_kvt.send": offer,
    }
    assert [link["spanId"] for link in by_name["sage_kvt.load"]["links"]] == [offer]


def test_every_span_and_event_lies_within_the_request() -> None:
    (request,) = (span for span in spans() if span["name"] == "request")
    begin, end = int(request["startTimeUnixNano"]), int(request["endTimeUnixNano"])
    for span in spans():
        events = [one["timeUnixNano"] for one in span.get("events", ())]
        times = [span["startTimeUnixNano"], *events, span["endTimeUnixNano"]]
        assert all(begin <= int(at) <= end for at in times), span["name"]
