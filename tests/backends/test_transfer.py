# SPDX-License-Identifier: Apache-2.0
"""Any split of any bytes arrives as it was, over each backend; what must be refused is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import EventKind, Status
from tests.backends.pair import KINDS, Pair, from_start, memory, runs, whole

SIZE = 100_000


@pytest.fixture(params=list(KINDS), scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with Pair(request.param) as made:
        yield made


@st.composite
def cuts(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Disjoint (start, length) runs of SIZE bytes, in any order."""
    points = sorted(draw(st.sets(st.integers(0, SIZE), min_size=2, max_size=40)))
    spans = [(a, b - a) for a, b in zip(points[::2], points[1::2], strict=False) if b > a]
    return draw(st.permutations(spans))


@settings(max_examples=60, deadline=None)
@given(source_runs=cuts(), target_runs=cuts(), checksum=st.booleans(), generation=st.integers(1, 2**64 - 1))
def test_bytes_arrive_in_order_through_any_split(
    pair: Pair,
    source_runs: list[tuple[int, int]],
    target_runs: list[tuple[int, int]],
    checksum: bool,
    generation: int,
) -> None:
    total = min(sum(n for _, n in source_runs), sum(n for _, n in target_runs))
    if total == 0:
        return
    source, target = memory(pair.sender, SIZE, seed=7), memory(pair.receiver, SIZE)
    source_runs, target_runs = clipped(source_runs, total), clipped(target_runs, total)
    window = pair.receiver.open_window(pair.incoming, runs(target, target_runs), generation)
    descriptors, offset = [], 0
    for start, length in source_runs:
        descriptors.append((source.ctypes.data + start, offset, length))
        offset += length
    pair.sender.post(
        pair.outgoing,
        pair.receiver.window_descriptor(window),
        np.array(descriptors, dtype=np.uint64),
        generation,
        checksum=checksum,
    )
    done = pair.landed.take(EventKind.WINDOW_DONE, EventKind.WINDOW_FAILED)
    sent = pair.sent.take(EventKind.SENT)
    assert (done.kind, done.id, done.length) == (EventKind.WINDOW_DONE, window, total)
    assert (sent.status, sent.length) == (Status.OK, total)
    expected = np.zeros(SIZE, np.uint8)
    stream = np.concatenate([source[a : a + n] for a, n in source_runs])
    offset = 0
    for start, length in target_runs:
        expected[start : start + length] = stream[offset : offset + length]
        offset += length
    assert np.array_equal(target, expected)
    assert pair.receiver.close_window(window) == total


def clipped(spans: list[tuple[int, int]], total: int) -> list[tuple[int, int]]:
    """The first ``total`` bytes of ``spans``."""
    out = []
    for start, length in spans:
        length = min(length, total)
        if length:
            out.append((start, length))
        total -= length
    return out


def test_lower_priority_numbers_go_first(pair: Pair) -> None:
    """A long transfer is overtaken: chunks of the urgent one land before its last."""
    long, urgent = memory(pair.sender, 4 << 20, seed=1), memory(pair.sender, 4096, seed=2)
    for_long, for_urgent = memory(pair.receiver, 4 << 20), memory(pair.receiver, 4096)
    windows = [
        pair.receiver.open_window(pair.incoming, whole(target), 5) for target in (for_long, for_urgent)
    ]
    described = [pair.receiver.window_descriptor(window) for window in windows]
    pair.sender.post(pair.outgoing, described[0], from_start(long), 5, priority=9)
    pair.sender.post(pair.outgoing, described[1], from_start(urgent), 5, priority=1)
    for _ in windows:
        pair.landed.take(EventKind.WINDOW_DONE)
        pair.sent.take(EventKind.SENT)
    assert np.array_equal(long, for_long)
    assert np.array_equal(urgent, for_urgent)


def test_arguments_are_named_when_refused(pair: Pair) -> None:
    data = memory(pair.sender, 4096, seed=3)
    with pytest.raises(ValueError, match=r"segments has shape \(1, 3\)"):
        pair.receiver.open_window(pair.incoming, from_start(data), 1)
    with pytest.raises(ValueError, match="dtype int64"):
        pair.receiver.open_window(pair.incoming, whole(data).astype(np.int64), 1)
    with pytest.raises(ValueError, match="window_descriptor has 3 bytes"):
        pair.sender.post(pair.outgoing, b"abc", from_start(data), 1)
    with pytest.raises(ValueError, match="must start with"):
        pair.sender.connect("ftp://nowhere", 1.0)
    with pytest.raises(ValueError, match="empty or overflows"):
        pair.sender.register_memory(0, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_in_use_stays_registered(kind: str) -> None:
    with Pair(kind) as fresh:
        receiver, data = fresh.receiver, np.zeros(4096, np.uint8)
        region = receiver.register_memory(data.ctypes.data, 4096)
        window = receiver.open_window(fresh.incoming, whole(data), 1)
        with pytest.raises(ValueError, match=f"used by window {window}"):
            receiver.deregister_memory(region)
        receiver.close_window(window)
        receiver.deregister_memory(region)
        with pytest.raises(ValueError, match="is unknown"):
            receiver.deregister_memory(region)
        with pytest.raises(ValueError, match="not registered"):
            receiver.open_window(fresh.incoming, whole(data), 1)


def test_crc32c_is_the_same_by_every_instruction_set() -> None:
    data = np.random.default_rng(0).integers(0, 256, 70_001, dtype=np.uint8).tobytes()
    assert set(_data_plane.crc32c_by_each(b"123456789", 0).values()) == {0xE3069283}
    for size in (0, 1, 63, 64, 65, 1024, 4097, 70_001):
        assert len(set(_data_plane.crc32c_by_each(data[:size], 0).values())) == 1


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 8)), max_size=30))
def test_merging_joins_exactly_the_neighbours(steps: list[tuple[int, int, int]]) -> None:
    rows = np.array(steps, dtype=np.uint64).reshape(-1, 3)
    merged = _data_plane.merge_descriptors(rows)
    reference: list[list[int]] = []
    for local, remote, length in steps:
        if length == 0:
            continue
        last = reference[-1] if reference else None
        if last and last[0] + last[2] == local and last[1] + last[2] == remote:
            last[2] += length
        else:
            reference.append([local, remote, length])
    assert merged == reference
