# SPDX-License-Identifier: Apache-2.0
"""The arena never gives a byte twice, loses none, and fails for nothing but size."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sage_kv_connector.store.arena import GRAIN, Arena, Extent

CAPACITY = 24 * GRAIN


class ArenaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(CAPACITY + 17)
        self.taken: list[tuple[Extent, ...]] = []

    @rule(nbytes=st.integers(1, 9 * GRAIN))
    def allocate(self, nbytes: int) -> None:
        free = self.arena.free_bytes
        extents = self.arena.allocate(nbytes)
        rounded = Arena.rounded(nbytes)
        assert (extents is None) == (rounded > free)
        if extents is not None:
            assert sum(length for _, length in extents) == rounded
            self.taken.append(extents)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.taken:
            self.arena.free(self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1))))

    @invariant()
    def nothing_overlaps_or_is_lost(self) -> None:
        pieces = sorted(extent for extents in self.taken for extent in extents)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(pieces))
        assert all(offset >= 0 and offset + n <= CAPACITY for offset, n in pieces)
        assert self.arena.free_bytes == CAPACITY - sum(n for _, n in pieces)

    def teardown(self) -> None:
        for extents in self.taken:
            self.arena.free(extents)
        assert self.arena.allocate(CAPACITY) == ((0, CAPACITY),), "free neighbours grow together"


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_capacity_below_a_grain_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity is 100 bytes"):
        Arena(100)
