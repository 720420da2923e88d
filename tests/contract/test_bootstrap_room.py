# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.bootstrap_room import MAX_ROOM, MAX_ROOMS, RoomUses


@given(st.lists(st.integers(1, MAX_ROOM), min_size=1, max_size=20))
def test_both_sides_count_alike(rooms: list[int]) -> None:
    prefill, decode = RoomUses(), RoomUses()
    found = [prefill.next(room) for room in rooms * 3]
    assert found == [decode.next(room) for room in rooms * 3]
    assert all(0 < room <= MAX_ROOM for room in found)


@given(st.integers(1, MAX_ROOM), st.integers(1, 16))
def test_each_use_goes_to_the_data_parallel_rank_of_the_room(room: int, ranks: int) -> None:
    uses = RoomUses()
    found = [uses.next(room) for _ in range(100)]
    assert len(set(found)) == 100
    assert {one % ranks for one in found} == {room % ranks}
    assert found[0] == room


def test_rooms_are_forgotten_in_the_end() -> None:
    uses = RoomUses()
    for room in range(1, MAX_ROOMS + 2):
        uses.next(room)
    assert uses.next(1) == 1
    assert uses.next(MAX_ROOMS) != MAX_ROOMS
