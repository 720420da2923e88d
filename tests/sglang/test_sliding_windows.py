# SPDX-License-Identifier: Apache-2.0
"""Hybrid pools between two ranks: what lies in a request's window crosses beside what all other layers keep."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from sage_kv_connector.contract.bootstrap_room import MetadataKind
from sage_kv_connector.integrations.sglang.options import CONFIG_ENV
from sage_kv_connector.integrations.sglang.sliding_windows import follow_windows
from tests.engine.paged_side import eventually
from tests.sglang.on_device import (
    DECODE,
    HEADS,
    LAYERS,
    MEMORY,
    OTHERS,
    PAGES,
    PREFILL,
    ROOM,
    ROW,
    THEIR_ROW,
    TORCH,
    WINDOW_PAGES,
    WINDOWED,
    Layout,
    Serve,
    Server,
    array,
    failed,
    landed,
    status,
)
from tests.sglang.stand_in import KVPoll, Surroundings
from tests.vendors.rig import Rig

#: By page size: the window, in tokens.
WINDOWS = {1: 4, 16: 40, 32: 40}


def hybrid(page_size: int, **more: Any) -> Layout:
    return Layout(page_size=page_size, window=WINDOWS[page_size], **more)


class Pages(NamedTuple):
    """A request's on one side, as SGLang names them: ``full`` from the prefix on, ``windows`` of the last tokens."""

    full: list[int]
    windows: list[int]
    window_begin: int
    prefix: int = 0


def pages_of(layout: Layout, tokens: int, seed: int, prefix: int = 0) -> Pages:
    random = np.random.default_rng(seed)
    size, begin = layout.page_size, max(0, tokens - layout.window)
    end = -(-tokens // size)
    full = random.permutation(np.arange(1, PAGES))[: end - prefix // size].tolist()
    first = max(prefix, begin) // size
    windows = random.permutation(np.arange(1, WINDOW_PAGES))[: end - first].tolist()
    return Pages(full, windows, begin, prefix)


def send(prefill: Server, pages: Pages, chunks: int = 1) -> Any:
    sender = prefill.sender(ROOM, len(pages.full), ROW)
    for chunk in np.array_split(np.array(pages.full, dtype=np.int32), chunks):
        sender.send(chunk, [array(pages.windows)])
    return sender


def receive(decode: Server, prefill: Server, pages: Pages, **more: Any) -> Any:
    told: dict[str, Any] = {
        "windows": pages.windows,
        "window_begin": pages.window_begin,
        "prefix": pages.prefix,
    }
    return decode.receiver(prefill, ROOM, pages.full, THEIR_ROW, **(told | more))


def rows(
    buffers: list[npt.NDArray[np.uint8]], ids: list[int], end: int, size: int
) -> dict[int, npt.NDArray[np.uint8]]:
    """By token, of pages that end with the page of token ``end`` - 1: its bytes in all buffers."""
    first = (-(-end // size) - len(ids)) * size
    tokens = [copy[ids].reshape(len(ids) * size, -1) for copy in buffers]
    return {first + at: np.concatenate([one[at] for one in tokens]) for at in range(len(ids) * size)}


def values(row: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Of bytes of bf16."""
    return (row.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def compare(
    prefill: Server, there: Pages, decode: Server, here: Pages, tokens: int, error: float = 0.0
) -> None:
    """Each token that decode wanted is in its page; ``error``: of the largest value, where the wire is coarser."""
    decode.read()
    for sent, got, begin in (
        (prefill.pool, decode.pool, here.prefix),
        (prefill.windows, decode.windows, max(here.prefix, here.window_begin)),
    ):
        which = "full" if got is decode.pool else "windows"
        theirs = rows(sent, getattr(there, which), tokens, prefill.layout.page_size)
        ours = rows(got, getattr(here, which), tokens, decode.layout.page_size)
        for token in range(begin, tokens):
            if not error:
                assert np.array_equal(theirs[token], ours[token]), (which, token)
            else:
                off = np.abs(values(theirs[token]) - values(ours[token])).max()
                assert off <= error * 4, (which, token, off)
    assert decode.row(THEIR_ROW) == prefill.row(ROW)


def moved(prefill: Server) -> int:
    """Bytes of the room's KV."""
    row = sum(int(one.shape[1]) for one in prefill.metadata)
    return int(prefill.manager.rooms.delivered(ROOM).nbytes) - row


def succeeded(end: Any) -> bool:
    return status(end) == KVPoll.Success


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
    prefill.launch(there.full)
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


def test_another_window_is_another_cache(serve: Serve) -> None:
    prefill = serve(PREFILL, None, hybrid(16))
    decode = serve(DECODE, None, hybrid(16)._replace(window=64))
    here = pages_of(decode.layout, 100, 2)
    failed(receive(decode, prefill, here), decode, "slidingwindow:64 here, slidingwindow:40 at the peer")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"windows": None}, "state_indices: 0 lists of pages, expected 1"),
        ({"windows": []}, "state_indices: [] lack pages of the last of 7"),
        ({"windows": [3, 0, 5, 6]}, "state_indices: [3, 0, 5, 6] lack pages of the last of 7"),
        ({"windows": [3, -1, 5, 6]}, "state_indices: [3, -1, 5, 6] are no page ids"),
        ({"windows": [1, 2, 3, 4, 5, 6, 7, 8]}, "are no page ids of the last of 7 pages"),
        ({"windows": [3, 4, 5]}, "3 of 7 pages of 16 tokens, but the window begins at token 60"),
        ({"windows": [3, 4, 5, 6, 7]}, "5 of 7 pages of 16 tokens, but the window begins at token 60"),
        (
            {"windows": [3, 4, 5, WINDOW_PAGES]},
            f"page id {WINDOW_PAGES} of group 1 is not among its 15 pages",
        ),
        ({"metadata": MetadataKind.FIRST_TOKEN}, "go between SGLang's servers only"),
    ],
)
def test_what_decode_can_not_have_meant_is_refused_by_name(
    serve: Serve, change: dict[str, Any], why: str
) -> None:
    layout = hybrid(16)
    prefill, decode = serve(PREFILL, None, layout), serve(DECODE, None, layout)
    here = pages_of(layout, 100, 2)
    assert (len(here.full), len(here.windows), here.window_begin) == (7, 4, 60)
    before = [copy.copy() for copy in (*decode.pool, *decode.windows)]
    send(prefill, pages_of(layout, 100, 1))
    failed(receive(decode, prefill, here, **change), decode, why)
    for copy, old in zip((*decode.pool, *decode.windows), before, strict=True):
        assert np.array_equal(copy, old)


@pytest.mark.parametrize(
    ("windows", "why"),
    [
        (None, "state_indices: 0 lists of pages, expected 1"),
        ([list(range(1, 9))], "state_indices: [1, 2, 3, 4, 5, 6, 7, 8] are no page ids of the last of 7"),
        ([[2, -3]], "state_indices: [2, -3] are no page ids"),
    ],
)
def test_what_prefill_can_not_have_meant_fails_the_room_by_name(serve: Serve, windows: Any, why: str) -> None:
    layout = hybrid(16)
    prefill, decode = serve(PREFILL, None, layout), serve(DECODE, None, layout)
    there = pages_of(layout, 100, 1)
    receiver = receive(decode, prefill, pages_of(layout, 100, 2))
    sender = prefill.sender(ROOM, 7, ROW)
    sender.send(array(there.full), windows)
    failed(sender, prefill, f"prefill's sliding windows: {why}")
    failed(receiver, decode, f"prefill's sliding windows: {why}")


NOT_KEPT = "page 3 of group 1 is no longer kept here"


@pytest.mark.parametrize(
    ("theirs", "ours", "why"),
    [
        ([4, 5, 6], 16, NOT_KEPT),
        ([4, 5, 6], 32, NOT_KEPT),
        ([0, 4, 5, 6], 16, NOT_KEPT),
        ([0, 4, 5, 6], 32, NOT_KEPT),
        ([], 16, NOT_KEPT),
        ([], 32, NOT_KEPT),
        ([4, 5, 6, WINDOW_PAGES], 16, f"page id {WINDOW_PAGES} of group 1 is not among its 15 pages"),
        ([4, 5, 6, WINDOW_PAGES], 32, f"page is {WINDOW_PAGES}, allowed: 0 to 14"),
    ],
)
def test_a_window_that_prefill_does_not_keep_is_refused_by_name(
    serve: Serve, theirs: list[int], ours: int, why: str
) -> None:
    """Whatever each side names: pages are matched by the tokens they stand for, so none lands in another's place."""
    prefill, decode = serve(PREFILL, None, hybrid(16)), serve(DECODE, None, hybrid(ours))
    here = pages_of(decode.layout, 100, 2)
    send(prefill, pages_of(prefill.layout, 100, 1)._replace(windows=theirs))
    failed(receive(decode, prefill, here), decode, why)


def test_a_longer_prompt_than_prefill_has_is_refused_by_name(serve: Serve) -> None:
    layout = hybrid(16)
    prefill, decode = serve(PREFILL, None, layout), serve(DECODE, None, layout)
    send(prefill, pages_of(layout, 100, 1))
    failed(
        receive(decode, prefill, pages_of(layout, 116, 2)), decode, "prefill ended with 7 pages of group 0"
    )


def test_a_shorter_prompt_gets_what_is_still_kept_of_its_window_or_nothing(serve: Serve) -> None:
    layout = hybrid(16)
    prefill, decode = serve(PREFILL, None, layout), serve(DECODE, None, layout)
    send(prefill, pages_of(layout, 100, 1))
    failed(
        receive(decode, prefill, pages_of(layout, 80, 2)), decode, "page 2 of group 1 is no longer kept here"
    )


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


def test_pools_that_are_more_than_this_are_refused_by_name(serve: Serve, surroundings: Surroundings) -> None:
    layout = hybrid(16)
    for more, why in (
        (
            {"state_types": ["swa", "block_scale_swa"]},
            r"state_types \[swa, block_scale_swa\].*another transfer backend",
        ),
        ({"swa_kv_cache_layout": "hnd"}, "swa_kv_cache_layout 'hnd'.*--disable-hybrid-swa-memory"),
        ({"swa_kv_cache_layout": None}, "swa_kv_cache_layout None"),
        ({"state_data_ptrs": [[]]}, "state_data_ptrs has 0 buffers, expected 2 for each of 2 layers"),
        ({"kv_data_ptrs": [1]}, "kv_data_ptrs has 1 buffers, expected 2 for each of 3 layers"),
    ):
        with pytest.raises(ValueError, match=why):
            serve(PREFILL, None, layout, **more)
    with pytest.raises(ValueError, match=r"state_types \[swa\] of a latent pool can't be transferred"):
        serve(PREFILL, None, Layout(planes=1, window=40))
    surroundings.parallel.pp_size = 2
    with pytest.raises(ValueError, match="pp_size is 2 with sliding windows; sage_kvt allows 1"):
        serve(PREFILL, None, layout)
