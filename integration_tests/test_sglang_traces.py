# SPDX-License-Identifier: Apache-2.0
"""Requests of SGLang, which gives its transfer classes no context: each room is a trace of its own, with both sides."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from integration_tests.cluster import wait_until
from integration_tests.recall import MODEL, recall_prompt
from integration_tests.trace_collector import Collected, TraceCollector
from sage_kv_connector.contract.bootstrap_room import metadata_transfer
from sage_kv_connector.launch.process import core_halves, running
from sage_kv_connector.launch.sglang import (
    DECODE,
    PREFILL,
    SglangOptions,
    generate,
    sglang_router,
    sglang_server,
)

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="runs in SGLang's environment")


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    made = TraceCollector()
    yield made
    made.close()


def test_a_room_is_one_trace_with_its_pages_and_its_metadata(
    collector: TraceCollector, scratch: Path
) -> None:
    options = SglangOptions(
        MODEL, scratch, 2048, 16384, ("--dtype", "bfloat16"), {"OTEL_BSP_SCHEDULE_DELAY": "200"}
    )
    transport: dict[str, object] = {"otlp_endpoint": collector.endpoint}
    first, second = core_halves()
    prefill = sglang_server("sglang-prefill-traced", options, PREFILL, first, transport=transport)
    decode = sglang_server("sglang-decode-traced", options, DECODE, second, transport=transport)
    router = sglang_router(prefill, decode, scratch)
    prompt, expected = recall_prompt(1, 331)
    with running(prefill, decode), running(router):
        assert generate(router.url, prompt, max_tokens=8).token_ids == expected
        spans: list[Collected] = []

        def arrived() -> bool:
            # SGLang warms itself up with requests of its own.
            last = collector.spans(name="sage_kvt.load")[-1:]
            spans[:] = [one for load in last for one in collector.spans(load.trace_id)]
            return len(spans) == 6

        wait_until(arrived, 30.0, lambda: str(spans))
    by_name = {(one.name, one.attributes["sage_kvt.transfer_id"]): one for one in spans}
    (pages,) = [one for one in spans if not one.parent]
    room = str(pages.attributes["sage_kvt.transfer_id"])
    beside = metadata_transfer(room)
    assert pages.name == "sage_kvt.offer"
    inside = {key: one.parent for key, one in by_name.items() if one is not pages}
    assert inside == {
        ("sage_kvt.send", room): pages.span_id,
        ("sage_kvt.load", room): pages.span_id,
        ("sage_kvt.offer", beside): pages.span_id,
        ("sage_kvt.send", beside): by_name["sage_kvt.offer", beside].span_id,
        ("sage_kvt.load", beside): pages.span_id,
    }
    assert all(one.error == "" for one in spans)
