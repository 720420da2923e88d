# SPDX-License-Identifier: Apache-2.0
"""Hybrid pools between two ranks: what lies in a request's window crosses beside what all other layers keep."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sage_kv_connector.integrations.sglang.options import CONFIG_ENV
from sage_kv_connector.integrations.sglang.sliding_windows import follow_windows
from tests.engine.paged_side import eventually
from tests.sglang.hybrid_request import Pages, compare, hybrid, moved, pages_of, receive, send, succeeded
from tests.sglang.on_device import (
    DECODE,
    HEADS,
    LAYERS,
    MEMORY,
    OTHERS,
    PREFILL,
    TORCH,
    WINDOWED,
    Serve,
    Server,
    failed,
    landed,
)
from tests.vendors.rig import Rig


def others(decode: Server, here: Pages) -> list[npt.NDArray[np.uint8]]:
    """All that the request has no part in."""
    decode.read()
    return [
        np.delete(copy, ids, axis=0).copy()
        for copies, ids in ((decode.pool, here.full), (decode.windows, here.windows))
        for copy in copies
    ]


#: (page size, tokens): shorter than the window, as long, at borders of pages and beside them, longer than two windows.
PROMPTS = [
    (1, 1),
    (1, 3),
    (1, 4),
    (1, 5),
    (1, 11),
    (16, 7),
    (16, 40),
    (16, 48),
    (16, 49),
    (16, 56),
    (16, 57),
    (16, 170),
]


@pytest.mark.parametrize(("page_size", "tokens"), PROMPTS)
@pytest.mark.parametrize("chunks", [1, 3])
def test_full_pages_and_the_windows_land_and_nothing_else_moves(
    serve: Serve, page_size: int, tokens: int, chunks: int
) -> None:
    layout = hybrid(page_size)
    prefill, decode = serve(PREFILL, None, layout), serve(DECODE, None, layout)
    there, here = pages_of(layout, tokens, 1), pages_of(layout, tokens, 2)
    untouched = others(decode, here)
    receiver = receive(decode, prefill, here)
    sender = send(prefill, there, min(chunks, len(there.full)))
    landed(receiver, decode)
    compare(prefill, there, decode, here, tokens)
    assert all(np.array_equal(a, b) for a, b in zip(untouched, others(decode, here), strict=True))
    eventually(partial(succeeded, sender))
    wanted = len(here.full) * 2 * len(OTHERS) + len(here.windows) * 2 * len(WINDOWED)
    assert moved(prefill) == wanted * decode.pool[0].shape[1]


@pytest.mark.parametrize(("tokens", "prefix"), [(11, 2), (11, 7), (11, 8), (11, 10), (4, 2)])
def test_a_prefix_that_decode_has_may_reach_into_the_window(serve: Serve, tokens: int, prefix: int) -> None:
    layout = hybrid(1)
    prefill, decode = serve(PREFILL, None, layout), serve(DECODE, None, layout)
    there, here = pages_of(layout, tokens, 1), pages_of(layout, tokens, 2, prefix)
    assert len(here.windows) == min(layout.window, tokens - prefix)
    send(prefill, there)
    landed(receive(decode, prefill, here), decode)
    compare(prefill, there, decode, here, tokens)


@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 16), (16, 16)])
@pytest.mark.parametrize(("wire", "error"), [("auto", 0.0), ("fp8_e4m3", 0.07), ("int4", 0.4)])
def test_other_pages_and_a_coarser_wire(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, theirs: int, ours: int, wire: str, error: float
) -> None:
    monkeypatch.setenv(CONFIG_ENV, f"backend=tcp,host=127.0.0.1,same_weights=false,target_dtype={wire}")
    prefill, decode = serve(PREFILL, None, hybrid(theirs)), serve(DECODE, None, hybrid(ours))
    for tokens in (7, 40, 48, 49, 56, 57, 73, 170):  # the window begins anywhere in a page of either side
        there, here = pages_of(prefill.layout, tokens, 1), pages_of(decode.layout, tokens, 2)
        receiver = receive(decode, prefill, here)
        sender = send(prefill, there, min(2, len(there.full)))
        landed(receiver, decode)
        compare(prefill, there, decode, here, tokens, error)
        eventually(partial(succeeded, sender))
        sender.clear()
        receiver.clear()


@pytest.mark.parametrize("staged", [False, True])
def test_windows_on_a_device(serve: Serve, rig: Rig, staged: bool) -> None:
    layout, tokens = hybrid(16), 100
    vendor = rig.runtime.vendor
    on_device = TORCH[vendor] == "npu"
    prefill = serve(PREFILL, rig, layout, metadata_on_device=on_device)
    theirs = None if staged else Rig(vendor, memory_bytes=MEMORY)
    decode = serve(DECODE, theirs, layout, metadata_on_device=on_device and not staged)
    there, here = pages_of(layout, tokens, 1), pages_of(layout, tokens, 2)
    receiver = receive(decode, prefill, here)
    prefill.launch(there.full, there.windows)
    send(prefill, there)
    landed(receiver, decode)
    compare(prefill, there, decode, here, tokens)


@pytest.mark.parametrize("page_size", [16, 32])
def test_windows_with_other_heads_go_as_they_are_between_equal_pools_only(
    serve: Serve, page_size: int
) -> None:
    tokens = 100
    prefill = serve(PREFILL, None, hybrid(16, window_heads=2 * HEADS))
    decode = serve(DECODE, None, hybrid(page_size, window_heads=2 * HEADS))
    heads = [dict(group.layers[0].planes[0].schema.axes)["head"] for group in decode.manager.view.groups]
    assert heads == [HEADS, 2 * HEADS]
    there, here = pages_of(prefill.layout, tokens, 1), pages_of(decode.layout, tokens, 2)
    send(prefill, there)
    receiver = receive(decode, prefill, here)
    if page_size == 16:
        landed(receiver, decode)
        compare(prefill, there, decode, here, tokens)
    else:
        failed(receiver, decode, "page_size: 32 here, 16 at the peer")


def test_layers_are_matched_by_their_numbers_in_the_model(serve: Serve) -> None:
    view = serve(PREFILL, None, hybrid(16)).manager.view
    names = [[layer.name.split(".")[2] for layer in group.layers] for group in view.groups]
    assert names == [list(map(str, OTHERS)), list(map(str, WINDOWED))] and len(OTHERS) == LAYERS
    assert [group.kind for group in view.groups] == ["fullattention", "slidingwindow:40"]


def test_the_windows_begin_is_heard_where_sglang_asks_for_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class DecodePreallocQueue:
        scheduler = SimpleNamespace(sliding_window_size=40)

        @staticmethod
        def _rebootstrap_prefill_len(req: Any) -> int:
            return len(req.tokens)

        def _send_kv_metadata(self, decode_req: Any, *pages: int, **more: int) -> tuple[Any, ...]:
            return decode_req.kv_receiver.window_begin, pages, more

    module = ModuleType("sglang.srt.disaggregation.decode")
    module.DecodePreallocQueue = DecodePreallocQueue  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    follow_windows()
    follow_windows()
    queue = DecodePreallocQueue()
    for tokens, begin in ((100, 60), (30, 0)):
        asked = SimpleNamespace(req=SimpleNamespace(tokens=[0] * tokens), kv_receiver=SimpleNamespace())
        assert queue._send_kv_metadata(asked, 1, 2, decode_prefix_len=3) == (
            begin,
            (1, 2),
            {"decode_prefix_len": 3},
        )
    queue.scheduler = SimpleNamespace(sliding_window_size=None)
    asked = SimpleNamespace(req=None, kv_receiver=SimpleNamespace(window_begin=None))
    assert queue._send_kv_metadata(asked) == (None, (), {})
