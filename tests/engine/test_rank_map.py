# SPDX-License-Identifier: Apache-2.0
"""Every head reaches every decode rank that needs it, once, whatever the two sizes are."""

from __future__ import annotations

import pytest

from sage_kv_connector.integrations.common.rank_map import (
    ReadFrom,
    head_range,
    map_ranks,
    read_ranks,
    unread_ranks,
)


@pytest.mark.parametrize("total", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("peer_size", [1, 2, 4, 8])
def test_each_head_is_read_once_and_readers_are_counted(total: int, size: int, peer_size: int) -> None:
    consumers: dict[int, int] = {}
    for rank in range(size):
        covered: list[int] = []
        needed = head_range(rank, size, total)
        for there, expected in map_ranks(rank, size, peer_size, 1, total):
            covered += [head for head in head_range(there, peer_size, total) if head in needed]
            consumers[there] = consumers.get(there, 0) + 1
            assert expected == sum(there in read_ranks(r, size, peer_size, total) for r in range(size))
        assert sorted(covered) == list(needed)
    assert sorted([*consumers, *unread_ranks(size, peer_size, 1, total)]) == list(range(peer_size))


def test_equal_sizes_read_from_their_own_rank() -> None:
    for total in (1, 2, 4):
        for rank in range(4):
            assert map_ranks(rank, 4, 4, 1, total) == [ReadFrom(rank, 1)]


def test_every_pipeline_stage_is_read() -> None:
    assert map_ranks(1, 2, 4, 2, 8) == [ReadFrom(1, 1), ReadFrom(3, 1)]


def test_sizes_that_do_not_divide_the_heads_are_named() -> None:
    with pytest.raises(ValueError, match="tp_size: 3 at the peer does not divide 4 kv heads"):
        map_ranks(0, 2, 3, 1, 4)
