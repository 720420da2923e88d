# SPDX-License-Identifier: Apache-2.0
"""``traceparent`` as clients and routers may send it, and the spans whose ids both sides know."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.bootstrap_room import metadata_transfer, pages_transfer
from sage_kv_connector.contract.trace import TraceContext, offer_trace, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (GOOD, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"00-{TRACE}-{SPAN}-fe", False),
        (f"cc-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
    ],
)
def test_a_context_is_read_and_written(text: str, sampled: bool) -> None:
    assert parse_traceparent(text) == TraceContext(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "given",
    [
        None, 1, b"", [], {}, "", "-", GOOD.upper(), GOOD + " ", " " + GOOD, GOOD + "-", GOOD + "-00", GOOD[:-1],
        GOOD.encode(), GOOD.replace("-", "_"), GOOD + "\n",
        f"ff-{TRACE}-{SPAN}-01", f"0-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01.x",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01", f"00-{TRACE}-{SPAN}0-01", f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE[:-1]}٣-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-{'x' * 1000}",
    ],
)  # fmt: skip
def test_what_is_no_context_is_as_good_as_none(given: object) -> None:
    assert parse_traceparent(given) is None


@given(st.text(max_size=80))
def test_any_text_is_a_context_that_can_be_written_again_or_none(text: str) -> None:
    found = parse_traceparent(text)
    assert found is None or parse_traceparent(found.text) == found


def test_an_offer_stands_in_its_requests_trace() -> None:
    request = parse_traceparent(GOOD)
    assert request is not None
    offer = offer_trace(request, "t")
    assert offer.trace_id == TRACE and offer.span_id != SPAN and parse_traceparent(offer.text) == offer
    unkept = offer_trace(request._replace(sampled=False), "t")
    assert unkept == offer._replace(sampled=False)
    assert len({offer, offer_trace(request, "u"), offer_trace(request, "t", 1)}) == 3


def test_without_a_context_a_name_makes_the_trace_which_a_room_shares() -> None:
    pages = pages_transfer(77)
    first, beside = offer_trace(None, pages), offer_trace(None, metadata_transfer(pages))
    assert first.trace_id == beside.trace_id and first.span_id != beside.span_id
    assert first == offer_trace(None, pages), "both sides make the same"
    assert offer_trace(None, "client-aux").trace_id != offer_trace(None, "client").trace_id
    assert offer_trace(None, "\ud800").trace_id, "a name need not be writable"
