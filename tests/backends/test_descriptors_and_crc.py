# SPDX-License-Identifier: Apache-2.0
"""The pure parts of the data plane: merging descriptors and CRC32C."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector._data_plane import crc32c, crc32c_by_each, crc32c_implementation, merge_descriptors
from tests.backends.pair import table


def _reference_merge(rows: list[tuple[int, int, int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for local, remote, length in rows:
        if length == 0:
            continue
        if merged and merged[-1][0] + merged[-1][2] == local and merged[-1][1] + merged[-1][2] == remote:
            merged[-1][2] += length
        else:
            merged.append([local, remote, length])
    return merged


@st.composite
def _descriptor_lists(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Lists in which a descriptor often continues the one before, on one side or both."""
    rows: list[tuple[int, int, int]] = []
    local, remote = 1000, 0
    for _ in range(draw(st.integers(0, 30))):
        local += draw(st.sampled_from([0, 0, 0, 1, 64]))
        remote += draw(st.sampled_from([0, 0, 0, 1, 64]))
        length = draw(st.sampled_from([0, 1, 64, 4096]))
        rows.append((local, remote, length))
        local, remote = local + length, remote + length
    return draw(st.permutations(rows)) if draw(st.booleans()) else rows


@given(_descriptor_lists())
def test_merge_matches_the_reference(rows: list[tuple[int, int, int]]) -> None:
    assert merge_descriptors(table(rows).reshape(-1, 3)) == _reference_merge(rows)


@given(_descriptor_lists())
def test_merging_moves_the_same_bytes_in_the_same_order(rows: list[tuple[int, int, int]]) -> None:
    def moved(descriptors: list[list[int]]) -> list[tuple[int, int]]:
        return [(local + i, remote + i) for local, remote, length in descriptors for i in range(length)]

    assert moved(merge_descriptors(table(rows).reshape(-1, 3))) == moved([list(row) for row in rows])


def _reference_crc(data: bytes, crc: int) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_known_vector() -> None:
    assert set(crc32c_by_each(b"123456789", 0).values()) == {0xE3069283}
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c_implementation() in crc32c_by_each(b"", 0)


@given(st.binary(max_size=3000), st.integers(0, 2**32 - 1))
def test_every_implementation_computes_the_definition(data: bytes, seed: int) -> None:
    assert set(crc32c_by_each(data, seed).values()) == {_reference_crc(data, seed)}


def test_every_length_around_the_wide_steps_and_every_alignment() -> None:
    data = np.random.default_rng(0).integers(0, 256, 6000, dtype=np.uint8).tobytes()
    for size in [*range(0, 70), *range(250, 262), *range(500, 1300), 4095, 4096, 4097, 5000]:
        assert len(set(crc32c_by_each(data[size % 7 : size % 7 + size], 0).values())) == 1


@given(st.binary(max_size=2000), st.integers(0, 2000))
def test_a_crc_continues_over_parts(data: bytes, cut: int) -> None:
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)
