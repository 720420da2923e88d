# SPDX-License-Identifier: Apache-2.0
"""Which packings of vLLM's CPU caches are known, and what they are."""

from __future__ import annotations

import pytest

from sage_kv_connector.contract.element_order import packed_cpu_planes


@pytest.mark.parametrize(
    ("packing", "item", "page_size", "dim", "known"),
    [
        ("cpu-vec", 2, 128, 64, True),
        ("cpu-vec", 4, 128, 64, True),
        ("cpu-vxe", 2, 128, 64, True),
        ("cpu-neon", 4, 128, 64, True),
        ("cpu-neon", 2, 128, 64, False),  # its tiles of two-byte elements were not seen
        ("cpu-amx", 2, 128, 64, True),
        ("cpu-amx", 2, 24, 64, False),
        ("cpu-amx", 2, 128, 24, False),
        ("cpu-other", 2, 128, 64, False),
        ("cpu-other", 4, 128, 64, False),
    ],
)
def test_a_packing_is_known_or_moves_between_equals_only(
    packing: str, item: int, page_size: int, dim: int, known: bool
) -> None:
    planes = packed_cpu_planes(packing, item, page_size, dim)
    assert (planes is not None) == known


@pytest.mark.parametrize(
    ("packing", "item"), [("cpu-vec", 2), ("cpu-neon", 4), ("cpu-amx", 2), ("cpu-amx", 4)]
)
def test_each_element_of_a_block_has_a_place_of_its_own(packing: str, item: int) -> None:
    heads, page_size, dim = 2, 32, 16
    planes = packed_cpu_planes(packing, item, page_size, dim)
    assert planes is not None
    places = [
        order.offset
        + head * order.head_stride
        + (token % order.token[0]) * order.token[1]
        + (token // order.token[0]) * order.token[2]
        + (channel % order.channel[0]) * order.channel[1]
        + (channel // order.channel[0]) * order.channel[2]
        for order in planes
        for head in range(heads)
        for token in range(page_size)
        for channel in range(dim)
    ]
    assert sorted(places) == list(range(0, 2 * heads * page_size * dim * item, item))
