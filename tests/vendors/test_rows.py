# SPDX-License-Identifier: Apache-2.0
"""One call of a C function for each row, without the interpreter between them."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import pytest

from sage_kv_connector import _data_plane

U64 = ctypes.c_uint64
SIX = ctypes.CFUNCTYPE(ctypes.c_int, *[U64] * 6)


def table(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return np.random.default_rng(count).integers(0, 2**64, (count, 3), dtype=np.uint64)


def address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def test_each_row_is_a_call_with_its_words_in_order() -> None:
    seen: list[tuple[int, ...]] = []

    def note(*words: int) -> int:
        seen.append(words)
        return 0

    called = SIX(note)
    rows = table(5)
    words = [(2, 0), (-1, 2**64 - 1), (0, 0), (1, 0), (2, 0), (-1, 7)]
    assert _data_plane.call_rows(address(called), rows, words) == (5, 0)
    assert seen == [(n, 2**64 - 1, to, from_, n, 7) for to, from_, n in rows.tolist()]


def test_the_first_that_fails_is_the_last() -> None:
    calls = []

    def fail(first: int, *_: int) -> int:
        calls.append(first)
        return -5 if len(calls) == 3 else 0

    called = SIX(fail)
    rows = table(9)
    assert _data_plane.call_rows(address(called), rows, [(0, 0)]) == (2, -5)
    assert calls == rows[:3, 0].tolist()


def test_nothing_to_do_calls_nothing() -> None:
    assert _data_plane.call_rows(0, np.empty((0, 3), np.uint64), [(0, 0)]) == (0, 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [([(0, 0)] * 7, "7 entries, at most 6"), ([(3, 0)], "of column 3"), ([(-2, 0)], "of column -2")],
)
def test_bad_words_are_named(words: list[tuple[int, int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _data_plane.call_rows(0, table(1), words)


def test_other_threads_go_on_meanwhile() -> None:
    usleep = address(ctypes.CDLL(None).usleep)
    rows = np.full((20, 3), 10_000, np.uint64)
    thread = threading.Thread(target=_data_plane.call_rows, args=(usleep, rows, [(2, 0)]))
    begun = time.monotonic()
    thread.start()
    assert time.monotonic() - begun < 0.15
    thread.join()
    assert time.monotonic() - begun >= 0.2
