# SPDX-License-Identifier: Apache-2.0
"""Windows over device memory and the pcie backend's messages: bounds, overlaps, what a peer may get wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.window_copies import DeviceWindow


def window(*lengths: int) -> DeviceWindow:
    """Segments of these lengths, far apart."""
    segments = np.array([[1_000_000 * (i + 1), n] for i, n in enumerate(lengths)], dtype=np.uint64)
    return DeviceWindow(1, segments, 7)


def table(*rows: tuple[int, int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.array(rows, dtype=np.uint64)


@settings(max_examples=200)
@given(data=st.data())
def test_every_byte_of_a_range_goes_to_its_place(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    size = sum(lengths)
    target = window(*lengths)
    place = [1_000_000 * (i + 1) + b for i, n in enumerate(lengths) for b in range(n)]
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1)) if size > 1 else st.just(set())))
    ranges = list(zip([0, *cuts], [*cuts, size], strict=True))
    rows = [(50_000 + 100 * i, start, end - start) for i, (start, end) in enumerate(ranges)]
    wanted = {place[start + b]: source + b for source, start, n in rows for b in range(n)}
    shuffled = data.draw(st.permutations(rows))
    half = data.draw(st.integers(0, len(rows)))
    got: dict[int, int] = {}
    for part in (shuffled[:half], shuffled[half:]):
        if part:
            for to, source, n in target.copies(table(*part)).tolist():
                for b in range(n):
                    assert to + b not in got, "a byte was copied twice"
                    got[to + b] = source + b
    assert got == wanted


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 5, 6)],  # beyond the end
        [(0, 10, 1)],
        [(0, 0, 4), (9, 3, 2)],  # each other
        [(0, 2**63, 1)],
    ],
)
def test_ranges_that_don_t_fit_are_refused(rows: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match=r"outside a window of 10|overlap"):
        window(4, 6).copies(table(*rows))


def test_a_range_comes_once() -> None:
    target = window(10)
    target.copies(table((0, 0, 4), (0, 6, 2)))
    target.copies(table((0, 4, 2)))
    with pytest.raises(ValueError, match="came before"):
        target.copies(table((0, 7, 2)))
    target.copies(table((0, 8, 2)))


def offered(rows: list[tuple[int, int, int, int]], sizes: tuple[int, ...]) -> pm.Offered:
    message = pm.decode(
        pm.encode(pm.Offered(1, 0, 2, 3, (b"h",) * len(sizes), sizes, np.array(rows, dtype="<u8").tobytes()))
    )
    assert isinstance(message, pm.Offered)
    return message


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(1, 0, 0, 4)], "allocation 1 of 1"),
        ([(0, 0, 0, 101)], "leaves its allocation"),
        ([(0, 101, 0, 1)], "leaves its allocation"),
        ([(0, 2**64 - 1, 0, 2)], "leaves its allocation"),
        ([(0, 0, 0, 0)], "leaves its allocation"),
    ],
)
def test_a_copy_out_of_its_allocation_is_refused(rows: list[tuple[int, int, int, int]], said: str) -> None:
    with pytest.raises(pm.PcieProtocolError, match=said):
        pm.rows_of(offered(rows, (100,)))


def test_rows_within_their_allocation_are_taken() -> None:
    assert len(pm.rows_of(offered([(0, 0, 0, 100), (0, 99, 100, 1)], (100,)))) == 2


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_named_error(payload: bytes) -> None:
    try:
        pm.decode(payload)
    except pm.PcieProtocolError as error:
        assert str(error)


def test_a_table_of_broken_rows_is_refused() -> None:
    with pytest.raises(pm.PcieProtocolError, match="table has 31 bytes"):
        pm.decode(pm.encode(pm.Offered(1, 0, 2, 3, (b"h",), (1,), bytes(31))))
    with pytest.raises(pm.PcieProtocolError, match="don't fit together"):
        pm.decode(pm.encode(pm.Offered(1, 0, 2, 3, (b"h",), (1, 2), bytes(32))))


@pytest.mark.parametrize("size", [-1, 0, -(1 << 63)])
def test_an_allocation_of_no_size_is_refused(size: int) -> None:
    with pytest.raises(pm.PcieProtocolError, match="sizes are"):
        offered([(0, 0, 0, 1)], (size,))


def test_arrays_in_arrays_are_refused() -> None:
    with pytest.raises(pm.PcieProtocolError, match="not a message"):
        pm.decode(b"\x93\xa1m\xa1p" + b"\x91" * 60_000)
