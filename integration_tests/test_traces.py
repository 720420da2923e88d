# SPDX-License-Identifier: Apache-2.0
"""One request through a router, prefill and decode as one trace at a collector: in order, and inside one another."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from integration_tests.cluster import PREFILL_PARAMS, TIMES, learn, new_prompt, wait_until
from integration_tests.trace_collector import Collected, TraceCollector
from sage_kv_connector.contract.trace import TraceContext
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, core_halves, running
from sage_kv_connector.launch.vllm import Answer, VllmOptions, complete, router, vllm_server

#: A file that gets the trace of ``test_one_trace_…`` as OTLP's JSON.
KEEP_ENV = "SAGE_KVT_TRACE_FILE"
OURS = ("sage_kvt.offer", "sage_kvt.send", "sage_kvt.load")


@dataclass
class Traced:
    """Two servers, which export to one collector, and vLLM's router before them, in both its ways."""

    collector: TraceCollector
    prefill: Process
    decode: Process
    sequential: Process
    concurrent: Process  #: has heard of prefill

    def prefilled(self, prompt: list[int], headers: dict[str, str], **more: object) -> dict[str, Any]:
        """What prefill answers that decode must be sent."""
        params = PREFILL_PARAMS | more
        first = complete(
            self.prefill.url, prompt, max_tokens=1, kv_transfer_params=params, stream=False, headers=headers
        )
        assert first.kv_transfer_params is not None
        return first.kv_transfer_params

    def decoded(self, prompt: list[int], headers: dict[str, str], params: dict[str, Any]) -> Answer:
        return complete(self.decode.url, prompt, max_tokens=4, kv_transfer_params=params, headers=headers)

    def hand_over(self, prompt: list[int], headers: dict[str, str]) -> Answer:
        """As a router does that asks prefill first, and passes headers on."""
        return self.decoded(prompt, headers, self.prefilled(prompt, headers))

    def spans(self, trace_id: str, names: tuple[str, ...] = OURS) -> dict[str, Collected]:
        """Of a trace, once spans of all these names are there."""

        def arrived() -> bool:
            return not Counter(names) - Counter(span.name for span in self.collector.spans(trace_id))

        wait_until(arrived, 20.0, lambda: str([span.name for span in self.collector.spans(trace_id)]))
        return {span.name: span for span in self.collector.spans(trace_id)}


@pytest.fixture(scope="module")
def traced(scratch: Path, model: Path) -> Iterator[Traced]:
    collector = TraceCollector()
    bootstrap = free_port()
    # Their own spans, too: vLLM's go by gRPC unless it is told.
    theirs = ("--otlp-traces-endpoint", f"{collector.endpoint}/v1/traces")
    options = VllmOptions(
        model,
        scratch,
        2048,
        extra=("--dtype", "float32", *theirs),
        env={"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"},
    )
    words = {"host": "127.0.0.1", "otlp_endpoint": collector.endpoint, **TIMES}

    def word(**more: object) -> str:
        return "sage_kvt:" + ",".join(f"{key}={value}" for key, value in {**words, **more}.items())

    first, second = core_halves()

    def named(service: str) -> VllmOptions:
        return replace(options, env=options.env | {"OTEL_SERVICE_NAME": service})

    prefill = vllm_server("prefill-traced", named("prefill"), word(bootstrap_port=bootstrap), first)
    decode = vllm_server("decode-traced", named("decode"), word(), second)
    front = router(prefill, decode, scratch, dispatch="sequential", bootstrap_port=bootstrap)
    at_once = router(prefill, decode, scratch)
    with running(prefill, decode), running(front, at_once):
        learn(at_once)
        yield Traced(collector, prefill, decode, front, at_once)
    collector.close()


def no_trace() -> TraceContext:
    """A context whose span nobody exports."""
    return TraceContext(secrets.token_hex(16), secrets.token_hex(8))


def test_one_trace_runs_from_the_router_over_prefill_to_the_first_token(traced: Traced) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "router"}))
    provider.add_span_processor(
        SimpleSpanProcessor(OTLPSpanExporter(f"{traced.collector.endpoint}/v1/traces"))
    )
    with provider.get_tracer("router").start_as_current_span("request") as span:
        context = span.get_span_context()
        request = TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}")
        traced.hand_over(new_prompt(700), {"traceparent": request.text})
    provider.shutdown()
    spans = traced.spans(request.trace_id, (*OURS, "request", "llm_request", "llm_request"))
    every = traced.collector.spans(request.trace_id)
    assert len({span.span_id for span in every}) == len(every) == 6
    if os.environ.get(KEEP_ENV):
        text = json.dumps(traced.collector.as_json(request.trace_id), indent=1)
        Path(os.environ[KEEP_ENV]).write_text(text + "\n")
    root, offer, send, load = (spans[name] for name in ("request", *OURS))
    assert root.parent == "" and offer.parent == load.parent == root.span_id
    assert send.parent == offer.span_id and load.links == (offer.span_id,)
    asked = [one for one in every if one.name == "llm_request"]
    assert [one.parent for one in asked] == [root.span_id] * 2
    prefilled, decoded = asked
    order = [root.begins, prefilled.begins, offer.begins, decoded.begins, load.begins, send.begins]
    assert order == sorted(order)
    assert send.ends <= offer.ends + 1000 and offer.begins <= send.begins
    assert load.ends <= decoded.ends <= root.ends and offer.begins >= root.begins
    first_token = decoded.begins + int(decoded.attributes["gen_ai.latency.time_to_first_token"] * 1e9)
    assert load.ends <= first_token
    for one in (offer, send, load):
        times = [one.begins, *(at for _, at in one.events), one.ends]
        assert all(a <= b + 1000 for a, b in pairwise(times)), one
    assert [name for name, _ in load.events] == ["subscribe", "first page", "last page", "report"]
    assert dict(load.events)["first page"] >= dict(send.events)["subscribe"]
    assert send.attributes["sage_kvt.bytes"] == load.attributes["sage_kvt.bytes"] == 6 * 128 * 4096
    named = [one.resource["service.name"] for one in (offer, send, load, prefilled, decoded)]
    assert named == ["prefill", "prefill", "decode", "prefill", "decode"]


def test_without_headers_decode_joins_by_prefills_answer(traced: Traced) -> None:
    known = {span.span_id for span in traced.collector.spans(name="sage_kvt.load")}
    traced.hand_over(new_prompt(300), {})
    loads: list[Collected] = []

    def arrived() -> bool:
        loads[:] = [one for one in traced.collector.spans(name="sage_kvt.load") if one.span_id not in known]
        return bool(loads)

    wait_until(arrived, 20.0)
    spans = traced.spans(loads[0].trace_id)
    assert spans["sage_kvt.offer"].parent == ""
    assert spans["sage_kvt.load"].parent == spans["sage_kvt.send"].parent == spans["sage_kvt.offer"].span_id


@pytest.mark.parametrize("dispatch", ["sequential", "concurrent"])
def test_vllms_router_passes_the_context_on(traced: Traced, dispatch: str) -> None:
    request = no_trace()
    front = traced.sequential if dispatch == "sequential" else traced.concurrent
    complete(front.url, new_prompt(300), max_tokens=2, headers={"traceparent": request.text})
    spans = traced.spans(request.trace_id)
    assert spans["sage_kvt.load"].parent == spans["sage_kvt.offer"].parent == request.span_id


def test_a_failed_hand_over_is_an_error_in_the_requests_trace(traced: Traced) -> None:
    request, other = no_trace(), new_prompt(300)
    headers = {"traceparent": request.text}
    params = traced.prefilled(new_prompt(300), headers) | {"remote_prompt": None}
    answer = traced.decoded(other, headers, params)
    assert answer.token_ids == complete(traced.decode.url, other, max_tokens=4).token_ids
    load = traced.spans(request.trace_id, ("sage_kvt.load",))["sage_kvt.load"]
    assert load.parent == request.span_id and load.events[-1][0] == "failed"
    assert load.attributes["error.type"] == load.attributes["sage_kvt.code"] == "prompt"
    assert load.error.startswith("prompt: ")


def test_a_prefill_that_is_not_found_is_an_error_in_the_requests_trace(traced: Traced) -> None:
    request, prompt = no_trace(), new_prompt(200)
    nowhere = {
        "do_remote_prefill": True,
        "transfer_id": "t",
        "remote_engine_id": "gone",
        "remote_bootstrap_addr": f"http://127.0.0.1:{free_port()}",
    }
    traced.decoded(prompt, {"traceparent": request.text}, nowhere)
    load = traced.spans(request.trace_id, ("sage_kvt.load",))["sage_kvt.load"]
    assert load.parent == request.span_id and load.attributes["error.type"] == "bootstrap"
    assert [name for name, _ in load.events] == ["failed"]


@pytest.mark.parametrize("text", ["", "00-0-0-00", f"00-{'0' * 32}-{'0' * 16}-01", "x" * 5000])
def test_a_bad_context_harms_nothing(traced: Traced, text: str) -> None:
    prompt, headers = new_prompt(200), {"traceparent": text}
    params = traced.prefilled(prompt, headers, traceparent=text)
    answer = traced.decoded(prompt, headers, params | {"traceparent": text})
    assert answer.token_ids == complete(traced.decode.url, prompt, max_tokens=4).token_ids
