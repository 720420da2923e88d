# SPDX-License-Identifier: Apache-2.0
"""Lanes that know pages send each page once it is final, and put it where the receiver's pages lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import EventKind, Status
from sage_kv_connector.contract.cache_view import KVCacheView, group_view
from sage_kv_connector.engine.pages.layout import NULL_PAGE, page_indices, page_layout
from sage_kv_connector.engine.pages.target import window_segments
from sage_kv_connector.engine.session.transfer_messages import Runs
from tests.backends.kinds import KINDS, Kind
from tests.backends.pair import Pair


def _has_pages(kind: Kind) -> bool:
    backend = kind.make()
    try:
        return backend.capabilities.pages
    finally:
        backend.close()


KINDS_WITH_PAGES = [kind for kind in KINDS if _has_pages(kind)]
PAGES, TOKENS, DIM = 12, 4, 8


class Cache:
    """Group 0: K and V apart, a page in two runs. Group 1: one tensor a layer, whose pages are whole."""

    def __init__(self, layers: tuple[int, int], seed: int) -> None:
        random = np.random.default_rng(seed)

        def tensor(*shape: int) -> Any:
            return random.integers(0, 256, shape, dtype=np.uint8)

        self.tensors = [tensor(2, PAGES, TOKENS, DIM) for _ in range(layers[0])]
        apart = [
            (f"a{i}", [("kv", t, ("plane", "page", "token", "dim"))]) for i, t in enumerate(self.tensors)
        ]
        whole = [tensor(PAGES, TOKENS, 2 * DIM) for _ in range(layers[1])]
        self.tensors += whole
        axes = ("page", "token", "content")
        together = [(f"b{i}", [("kv", t, axes)]) for i, t in enumerate(whole)]
        self.view = KVCacheView(
            (
                group_view("fullattention", TOKENS, PAGES, apart),
                group_view("slidingwindow", TOKENS, PAGES, together),
            )
        )
        self.layers = layers

    def registered(self, backend: Any) -> None:
        for address, length in self.view.extents():
            backend.register_memory(address, length)

    def bytes_of(self, pages: dict[int, Any]) -> bytes:
        """The pages' bytes in the order of a window, by the other way to find them."""
        memory = {int(t.ctypes.data): t.reshape(-1) for t in self.tensors}
        out = []
        for address, length in window_segments(self.view, pages).tolist():
            start = max(base for base in memory if base <= address)
            out.append(memory[start][address - start :][:length].tobytes())
        return b"".join(out)


class Stream(NamedTuple):
    """``prompt``: pages of the request; ``runs``: which of them are wanted, by group; ``steps``: how far each gets."""

    layers: tuple[int, int]
    prompt: int
    runs: dict[int, Runs]
    steps: list[tuple[int, int, int]]  # group, layer, pages
    early: bool


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    layers = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    prompt = draw(st.integers(1, PAGES))
    runs: dict[int, Runs] = {}
    for group in draw(st.sampled_from([(0,), (1,), (0, 1)])):
        places = sorted(draw(st.sets(st.integers(0, prompt - 1), min_size=1)))
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        runs[group] = tuple((int(part[0]), len(part)) for part in np.split(np.array(places), cuts))
    steps = []
    for group, count in enumerate(layers):
        for layer in range(count):
            reached = draw(st.lists(st.integers(0, prompt), max_size=3))
            steps += [(group, layer, pages) for pages in [*reached, prompt]]
    return Stream(layers, prompt, runs, draw(st.permutations(steps)), draw(st.booleans()))


def _ids(seed: int, count: int) -> Any:
    return np.random.default_rng(seed).permutation(PAGES)[:count].astype(np.int64)


class Transfer:
    """A stream between two caches over a pair."""

    def __init__(self, pair: Pair, stream: Stream, generation: int = 5) -> None:
        backend: Any = pair.receiver
        sender: Any = pair.sender
        self.pair, self.stream = pair, stream
        self.source, self.target = Cache(stream.layers, 1), Cache(stream.layers, 2)
        self.source.registered(sender)
        self.target.registered(backend)
        self.tables = _data_plane.PageTables(list(stream.layers))
        self.table = {group: _ids(10 + group, stream.prompt) for group in (0, 1)}
        places = {group: page_indices(runs) for group, runs in stream.runs.items()}
        self.there = {group: self.table[group][chosen] for group, chosen in places.items()}
        self.here = {group: _ids(20 + group, len(chosen)) for group, chosen in places.items()}
        self.cursor = _data_plane.PagedCursor(
            page_layout(self.source.view), self.tables, list(stream.runs.items())
        )
        self.window = backend.open_paged_window(
            pair.to_sender, page_layout(self.target.view), list(self.here.items()), generation
        )
        self.descriptor = backend.window_descriptor(self.window)
        self.generation = generation

    def post(self) -> int:
        sender: Any = self.pair.sender
        post: int = sender.post_pages(self.pair.to_receiver, self.descriptor, self.cursor, self.generation)
        return post

    def grow(self) -> None:
        for group, ids in self.table.items():
            self.tables.append(group, ids)


@pytest.mark.parametrize("knowing", KINDS_WITH_PAGES, ids=lambda kind: kind.name)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stream=streams())
def test_every_page_lands_once_it_is_final(knowing: Kind, stream: Stream) -> None:
    pair = Pair(knowing)
    try:
        transfer = Transfer(pair, stream)
        if stream.early:
            post = transfer.post()
            transfer.grow()
        else:
            transfer.grow()
        for step in stream.steps[: len(stream.steps) // 2]:
            transfer.tables.advance(step[0], step[1], 1, step[2])
        if not stream.early:
            post = transfer.post()
        for step in stream.steps[len(stream.steps) // 2 :]:
            transfer.tables.advance(step[0], step[1], 1, step[2])
        assert pair.ended(transfer.window).kind == EventKind.WINDOW_DONE
        sent = pair.sent(post)
        assert (sent.status, sent.length) == (Status.OK, transfer.cursor.nbytes)
        assert transfer.target.bytes_of(transfer.here) == transfer.source.bytes_of(transfer.there)
    finally:
        pair.close()


@given(streams())
def test_descriptors_are_those_of_pages_that_are_final(stream: Stream) -> None:
    """Of a backend that does not know pages."""
    source = Cache(stream.layers, 1)
    tables = _data_plane.PageTables(list(stream.layers))
    table = {group: _ids(10 + group, stream.prompt) for group in (0, 1)}
    for group, ids in table.items():
        tables.append(group, ids)
    cursor = _data_plane.PagedCursor(page_layout(source.view), tables, list(stream.runs.items()))
    memory = {int(t.ctypes.data): t.reshape(-1) for t in source.tensors}
    window = bytearray(cursor.nbytes)
    seen = np.zeros(cursor.nbytes, dtype=np.int64)
    for group, layer, pages in stream.steps:
        assert cursor.take_ready() is None
        tables.advance(group, layer, 1, pages)
        rows = cursor.take_ready()
        for address, offset, length in [] if rows is None else rows.tolist():
            start = max(base for base in memory if base <= address)
            window[offset : offset + length] = memory[start][address - start :][:length].tobytes()
            seen[offset : offset + length] += 1
    assert cursor.exhausted and (seen == 1).all()
    there = {group: table[group][page_indices(runs)] for group, runs in stream.runs.items()}
    assert bytes(window) == source.bytes_of(there)


SIMPLE = Stream((2, 1), 6, {0: ((0, 6),)}, [], True)


@pytest.fixture(params=KINDS_WITH_PAGES, ids=lambda kind: kind.name)
def pages_pair(request: pytest.FixtureRequest) -> Any:
    pair = Pair(request.param)
    yield pair
    pair.close()


def test_a_request_that_ends_before_a_selected_page_says_so(pages_pair: Pair) -> None:
    transfer = Transfer(pages_pair, SIMPLE)
    post = transfer.post()
    transfer.grow()
    transfer.tables.end([5, 5])
    sent = pages_pair.sent(post)
    assert sent.status == Status.BEYOND_END
    assert sent.detail == "prefill ended with 5 pages of group 0, number 6 asked for"


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([3, NULL_PAGE, 4, 5, 6, 7], "page 1 of group 0 is no longer kept here"),
        ([3, 4], "page 5 of group 0 is beyond the 2 here"),
        ([3, 4, 5, 6, 7, PAGES], f"page id {PAGES} of group 0 is not among its {PAGES} pages"),
    ],
)
def test_a_page_without_memory_is_refused_by_name(pages_pair: Pair, ids: list[int], words: str) -> None:
    transfer = Transfer(pages_pair, SIMPLE)
    post = transfer.post()
    transfer.tables.append(0, np.array(ids, dtype=np.int64))
    transfer.tables.advance_all([6, 6])
    sent = pages_pair.sent(post)
    assert (sent.status, sent.detail) == (Status.OUT_OF_BOUNDS, words)
    pages_pair.receiver.close_window(transfer.window)
    pages_pair.transfers_still_work()


def test_a_stream_that_waits_can_be_cancelled(pages_pair: Pair) -> None:
    transfer = Transfer(pages_pair, SIMPLE)
    post = transfer.post()
    transfer.grow()
    transfer.tables.advance(0, 0, 1, 3)
    pages_pair.sender.cancel(post)
    assert pages_pair.sent(post).status == Status.CANCELLED
    transfer.tables.advance_all([6, 6])  # nobody is there any more
    pages_pair.receiver.close_window(transfer.window)
    pages_pair.transfers_still_work()


def test_what_the_cache_does_not_have_is_refused_at_once() -> None:
    cache = Cache((2, 1), 1)
    tables = _data_plane.PageTables([2, 1])
    layout = page_layout(cache.view)
    for selection in ([(2, [(0, 1)])], [(0, [(0, 2), (1, 1)])], [(1, [(0, 1)]), (0, [(0, 1)])], []):
        with pytest.raises(ValueError):
            _data_plane.PagedCursor(layout, tables, selection)
    with pytest.raises(ValueError, match="group is 2, there are 2"):
        tables.append(2, np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match=r"layers 1, \+2 are not among the 2 of group 0"):
        tables.advance(0, 1, 2, 1)
