# SPDX-License-Identifier: Apache-2.0
"""Which trace a request of vLLM's belongs to: by its headers, its parameters, or its transfer's name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.trace import TraceContext, offer_trace, parse_traceparent
from sage_kv_connector.integrations.vllm.metadata import Load, Offered
from sage_kv_connector.integrations.vllm.request_trace import LoadTrace
from sage_kv_connector.integrations.vllm.scheduler import SchedulerSide
from tests.integrations.test_vllm_orders import REMOTE, ordered, ranks, request
from tests.integrations.vllm_workers import SPEC, cache_config, vllm_config

ROUTER = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
CLIENT = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", sampled=False)
PREFILL = {"do_remote_decode": True, "transfer_id": "t"}


def side_with(**options: Any) -> SchedulerSide:
    config = KVTransportConfig.load(options)
    made = SchedulerSide(vllm_config(), cache_config(({"l0": SPEC}, SPEC)), config, "engine")
    made.set_ranks(ranks(7001))
    return made


@pytest.fixture
def side() -> SchedulerSide:
    pytest.importorskip("opentelemetry.sdk.trace")
    return side_with(otlp_endpoint="http://127.0.0.1:4318")


def traced(number: int, params: dict[str, Any], headers: Any = None) -> Any:
    made = request(number, params)
    made.trace_headers = headers
    return made


def offered(side: SchedulerSide, one: Any) -> Offered:
    side.on_new_request(one)
    (offer,) = ordered(side).offers
    return offer


def answered(side: SchedulerSide, one: Any) -> dict[str, Any]:
    one.status = RequestStatus.FINISHED_LENGTH_CAPPED
    _, params = side.request_finished(one, ([1, 2, 3],))
    assert params is not None
    return params


def loaded(side: SchedulerSide, one: Any) -> Load:
    side.on_new_request(one)
    side.num_new_matched_tokens(one, 0)
    blocks = SimpleNamespace(blocks=[[SimpleNamespace(block_id=i) for i in (4, 5, 6)]])
    side.update_state_after_alloc(one, blocks, 40)
    (load,) = ordered(side).loads
    return load


@pytest.mark.parametrize(
    ("headers", "params", "expected"),
    [
        ({"traceparent": ROUTER.text}, {}, ROUTER),
        (None, {"traceparent": CLIENT.text}, CLIENT),
        ({"traceparent": ROUTER.text}, {"traceparent": CLIENT.text}, ROUTER),
        ({"traceparent": "bad"}, {"traceparent": CLIENT.text}, CLIENT),
        ({"traceparent": ["x"]}, {"traceparent": 5}, None),
        ("headers", {}, None),
        ({"tracestate": "a=b"}, {}, None),
    ],
)
def test_headers_count_before_parameters_and_what_is_bad_is_none(
    side: SchedulerSide, headers: Any, params: dict[str, Any], expected: TraceContext | None
) -> None:
    one = traced(0, PREFILL | params, headers)
    assert offered(side, one).trace == expected
    named = answered(side, one)["traceparent"]
    assert parse_traceparent(named) == offer_trace(expected, "t"), "what decode hears is the offer's own span"


def test_decode_is_inside_the_requests_span_and_linked_to_prefills_offer(side: SchedulerSide) -> None:
    answer = REMOTE | {"traceparent": CLIENT.text}
    assert loaded(side, traced(0, answer, {"traceparent": ROUTER.text})).trace == LoadTrace(ROUTER, CLIENT)
    assert loaded(side, traced(1, answer)).trace == LoadTrace(CLIENT)
    assert loaded(side, traced(2, REMOTE)).trace == LoadTrace()


def test_requests_of_releases_without_trace_headers_have_none(side: SchedulerSide) -> None:
    assert offered(side, request(0, PREFILL)).trace is None


def test_without_an_endpoint_nothing_is_said_of_traces() -> None:
    side = side_with()
    one = traced(0, PREFILL | {"traceparent": CLIENT.text}, {"traceparent": ROUTER.text})
    assert offered(side, one).trace is None
    assert "traceparent" not in answered(side, one)
    assert loaded(side, traced(1, REMOTE, {"traceparent": ROUTER.text})).trace == LoadTrace()


def test_a_trace_that_begins_here_is_named_as_the_sampler_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    side = side_with(otlp_endpoint="http://127.0.0.1:4318")
    one = traced(0, PREFILL)
    offered(side, one)
    found = parse_traceparent(answered(side, one)["traceparent"])
    assert found is not None and not found.sampled
