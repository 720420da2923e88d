# SPDX-License-Identifier: Apache-2.0
"""Bytes land where the descriptors say, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_kv_connector.backends.base import EventKind, Status
from tests.backends.kinds import KINDS_OF, Kind
from tests.backends.pair import Pair, of_kind, random_bytes, table, until


class Transfer(NamedTuple):
    """A window of ``segments`` of the target, filled by ``pieces`` of the source; both (start, length)."""

    segments: list[tuple[int, int]]
    pieces: list[tuple[int, int]]
    order: list[int]
    posts: int
    checksum: bool


SPACE = 200_000


def _disjoint(draw: st.DrawFn, cuts: list[int]) -> list[tuple[int, int]]:
    """Ranges of [0, SPACE), some of which are left out, in any order."""
    bounds = [0, *sorted(set(cuts)), SPACE]
    ranges = [(a, b - a) for a, b in pairwise(bounds) if b > a]
    kept = draw(st.lists(st.sampled_from(ranges), min_size=1, unique=True))
    return draw(st.permutations(kept))


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    cuts = st.lists(st.integers(1, SPACE - 1), max_size=12)
    segments = _disjoint(draw, draw(cuts))
    total = sum(length for _, length in segments)
    bounds = [
        0,
        *sorted(set(draw(st.lists(st.integers(1, max(1, total - 1)), max_size=12))) - {total}),
        total,
    ]
    lengths = [b - a for a, b in pairwise(bounds) if b > a]
    # Sources may overlap; only the window must be filled once.
    pieces = [(draw(st.integers(0, SPACE - n)), n) for n in lengths]
    return Transfer(
        segments,
        pieces,
        draw(st.permutations(range(len(pieces)))),
        draw(st.integers(1, 4)),
        draw(st.booleans()),
    )


@pytest.fixture
def small_chunks(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair(chunk_bytes=8192)


@pytest.mark.any_memory
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(transfer=transfers(), seed=st.integers(0, 2**32 - 1))
def test_random_windows_and_posts_match_the_numpy_model(
    small_chunks: Pair, transfer: Transfer, seed: int
) -> None:
    pair = small_chunks
    source, target = random_bytes(SPACE, seed), np.zeros(SPACE, np.uint8)
    expected = target.copy()
    from_there = pair.places.register(pair.sender, source)
    to_there = pair.places.register(pair.receiver, target)
    linear = np.concatenate([np.arange(start, start + length) for start, length in transfer.segments])
    descriptors, offset = [], 0
    for start, length in transfer.pieces:
        expected[linear[offset : offset + length]] = source[start : start + length]
        descriptors.append((from_there + start, offset, length))
        offset += length
    window = pair.receiver.open_window(
        pair.to_sender, table([(to_there + s, n) for s, n in transfer.segments]), seed + 1
    )
    descriptor = pair.receiver.window_descriptor(window)
    shuffled = [descriptors[i] for i in transfer.order]
    posts = [
        pair.sender.post(pair.to_receiver, descriptor, table(part), seed + 1, checksum=transfer.checksum)
        for part in (shuffled[i :: transfer.posts] for i in range(transfer.posts))
        if part
    ]
    assert pair.ended(window).kind == EventKind.WINDOW_DONE
    events = until(pair.sender, lambda all: len(of_kind(all, EventKind.SENT)) == len(posts))
    assert {(e.id, e.status) for e in of_kind(events, EventKind.SENT)} == {(p, Status.OK) for p in posts}
    assert pair.receiver.close_window(window) == offset
    assert np.array_equal(pair.places.seen(target), expected)
    pair.places.deregister(pair.receiver, target)
    pair.places.deregister(pair.sender, source)


@pytest.mark.any_memory
def test_thousands_of_shuffled_pages_are_exact(pair: Pair) -> None:
    pages, page = 4096, 4096
    source, target = random_bytes(pages * page), np.zeros(pages * page, np.uint8)
    window, descriptor = pair.window(target, generation=5)
    from_there = pair.places.register(pair.sender, source)
    order = np.random.default_rng(1).permutation(pages)
    rows = [(from_there + int(p) * page, i * page, page) for i, p in enumerate(order)]
    for part in (rows[i::8] for i in range(8)):
        pair.sender.post(pair.to_receiver, descriptor, table(part), 5)
    done = pair.ended(window)
    assert (done.kind, done.length) == (EventKind.WINDOW_DONE, pages * page), done
    assert np.array_equal(pair.places.seen(target).reshape(pages, page), source.reshape(pages, page)[order])


def test_landed_tells_every_range_once_when_asked_for(pair: Pair) -> None:
    source, target = random_bytes(3 << 20), np.zeros(3 << 20, np.uint8)
    window, descriptor = pair.window(target, notify_chunks=True)
    pair.post(descriptor, source)
    events = until(pair.receiver, lambda all: bool(of_kind(all, EventKind.WINDOW_DONE, window)))
    landed = sorted((e.offset, e.length) for e in of_kind(events, EventKind.LANDED, window))
    assert [offset for offset, _ in landed] == [sum(n for _, n in landed[:i]) for i in range(len(landed))]
    assert sum(n for _, n in landed) == 3 << 20
    assert events[-1].kind == EventKind.WINDOW_DONE


@pytest.mark.any_memory
def test_both_directions_and_two_windows_at_once(pair: Pair) -> None:
    size = 5_000_001
    here, there = random_bytes(size, 1), random_bytes(size, 2)
    to_there, to_here = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    window, descriptor = pair.window(to_there)
    segments = table([(pair.places.register(pair.sender, to_here), size)])
    back = pair.sender.open_window(pair.to_receiver, segments, 2)
    rows = table([(pair.places.register(pair.receiver, there), 0, size)])
    pair.post(descriptor, here)
    pair.receiver.post(pair.to_sender, pair.sender.window_descriptor(back), rows, 2)
    until(pair.sender, lambda all: bool(of_kind(all, EventKind.WINDOW_DONE, back)))
    assert pair.ended(window).kind == EventKind.WINDOW_DONE
    assert np.array_equal(here, pair.places.seen(to_there))
    assert np.array_equal(there, pair.places.seen(to_here))


def test_the_mode_is_reported(kind: Kind, pair: Pair) -> None:
    info = pair.sender.connection_info(pair.to_receiver)
    assert info.lanes == kind.lanes and (not kind.mode or info.mode == kind.mode)
    assert kind.crosses_wire is None or info.crosses_wire == kind.crosses_wire
    # What is not the best of its backend says why.
    best = next(kinds[0] for kinds in KINDS_OF.values() if kind in kinds)
    assert bool(info.reason) == (kind.mode != best.mode)


def test_a_lane_that_never_spins_carries_everything(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(spin_us=0)
    for _ in range(3):
        pair.transfers_still_work()


def test_a_backend_may_connect_to_itself_many_times(kind: Kind) -> None:
    backend = kind.make()
    address = backend.listen(kind.listen_on)
    ids = [backend.connect(address, 5.0) for _ in range(8)]
    events = until(
        backend,
        lambda all: len(of_kind(all, EventKind.ACCEPTED)) == len(of_kind(all, EventKind.CONNECTED)) == 8,
    )
    assert sorted(e.connection for e in of_kind(events, EventKind.CONNECTED)) == sorted(ids)
    backend.close()
