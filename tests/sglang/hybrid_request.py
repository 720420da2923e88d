# SPDX-License-Identifier: Apache-2.0
"""A request on two ranks with hybrid pools: pages as SGLang names them, and what came of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.sglang.on_device import PAGES, ROOM, ROW, THEIR_ROW, WINDOW_PAGES, Layout, Server, array, status
from tests.sglang.stand_in import KVPoll

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
