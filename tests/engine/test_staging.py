# SPDX-License-Identifier: Apache-2.0
"""Staging memory is bounded, never handed out twice, and given in order."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.engine.conversion.staging import ALIGNMENT, Lease, StagingArena

CAPACITY = 16 * ALIGNMENT


def arena(registered: list[tuple[int, int]]) -> StagingArena:
    return StagingArena(CAPACITY, lambda address, length: registered.append((address, length)))


def test_memory_is_mapped_and_registered_once_when_it_is_first_needed() -> None:
    registered: list[tuple[int, int]] = []
    staging = arena(registered)
    assert not registered
    ready: list[Lease] = []
    leases = [staging.request(100, ready.append) for _ in range(3)]
    assert ready == leases and len(registered) == 1
    address, length = registered[0]
    assert all(address <= lease.address < address + length for lease in leases)


@given(sizes=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=30), data=st.data())
def test_leases_do_not_overlap_and_everyone_is_served_in_order(sizes: list[int], data: st.DataObject) -> None:
    staging = arena([])
    served: list[Lease] = []
    held: list[Lease] = []

    def ready(lease: Lease) -> None:
        served.append(lease)
        held.append(lease)
        spans = sorted((one.address, one.address + one.nbytes) for one in held)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))

    asked = [staging.request(size, ready) for size in sizes]
    while len(served) < len(asked):
        lease = held.pop(data.draw(st.integers(0, len(held) - 1)))
        staging.release(lease)
    assert served == asked
    for lease in held:
        staging.release(lease)
    assert staging.in_use == 0


def test_one_who_stopped_waiting_blocks_nobody() -> None:
    staging = arena([])
    ready: list[Lease] = []
    first = staging.request(CAPACITY, ready.append)
    waiting = staging.request(CAPACITY, ready.append)
    last = staging.request(1, ready.append)
    staging.release(waiting)
    staging.release(first)
    assert ready == [first, last] and not waiting.address


def test_a_smaller_one_is_served_when_the_larger_one_before_it_gives_up() -> None:
    staging = arena([])
    ready: list[Lease] = []
    first = staging.request(CAPACITY - ALIGNMENT, ready.append)
    waiting = staging.request(CAPACITY, ready.append)
    last = staging.request(1, ready.append)
    assert ready == [first]
    staging.release(waiting)
    assert ready == [first, last]


def test_more_than_all_of_it_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="staging_bytes"):
        arena([]).request(CAPACITY + 1, lambda _: None)
