# SPDX-License-Identifier: Apache-2.0
"""Conversions in the background, one at a time: what was cancelled touches no memory."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import pytest

from sage_kv_connector.contract.dtypes import dtype
from sage_kv_connector.engine.conversion.jobs import CpuConversions
from sage_kv_connector.engine.conversion.wire_plan import group_converter
from sage_kv_connector.format.converter import Span
from sage_kv_connector.format.wire_format import WireFormat
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.test_conversion import TOKENS, MakeCore, pages_for, write_content

PAGES, LONG = 24, 400_000


@pytest.mark.parametrize("verb", ["encode", "decode"])
def test_a_cancelled_job_writes_nothing(make_native_core: MakeCore, verb: str) -> None:
    side = ConvertingSide(make_native_core, Shape(), PAGES)
    pages = pages_for(side, 1)
    write_content(side, pages, range(TOKENS))
    group, schema = side.view.groups[0], side.schema
    assert dtype(schema.dtype).converted
    formats = tuple(WireFormat("fp8_e4m3", "token") for _ in group.canonical)
    converter = group_converter(group, 0, formats, schema, schema, schema)
    span = Span(0, 1, 0, 1, 0, TOKENS, pages)
    # The only thread is busy for many milliseconds: the same pages again and again.
    size = side.shape.page_size
    long = Span(0, 1, 0, 1, 0, LONG, [pages[i % len(pages)] for i in range(-(-LONG // size))])
    busy = np.zeros(converter.wire_bytes(long), np.uint8)
    wire = np.zeros((2, converter.wire_bytes(span)), np.uint8)
    jobs = CpuConversions(1, 1 << 20, lambda address, length: None)
    ended: list[str] = []

    def convert(name: str, span: Span, wire: npt.NDArray[np.uint8], verb: str = "encode") -> int:
        def done(why: str) -> None:
            assert not why
            ended.append(name)

        job: int = getattr(jobs, verb)(converter, span, wire.ctypes.data, len(wire), done)
        return job

    before = [layer.copy() for layer in side.cache]
    convert("busy", long, busy)
    jobs.cancel(convert("cancelled", span, wire[0], verb))
    jobs.cancel(12345)
    convert("last", span, wire[1])
    until = time.monotonic() + 20
    while "last" not in ended and time.monotonic() < until:
        for event in jobs.poll():
            jobs._on_event(event)
    assert ended == ["busy", "last"]
    assert wire[1].any() and not wire[0].any()
    assert all(map(np.array_equal, before, side.cache))
    assert jobs.counters()["conversions"] == 0
    jobs.close()
