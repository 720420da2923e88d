# SPDX-License-Identifier: Apache-2.0
"""Sliding windows that can't be what a request has, and pools that are more: errors by name, and no page is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sage_kv_connector.contract.bootstrap_room import MetadataKind
from tests.sglang.hybrid_request import hybrid, pages_of, receive, send
from tests.sglang.on_device import (
    DECODE,
    PREFILL,
    ROOM,
    ROW,
    WINDOW_PAGES,
    Layout,
    Serve,
    array,
    failed,
)
from tests.sglang.stand_in import Surroundings


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
