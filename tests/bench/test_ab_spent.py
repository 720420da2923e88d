# SPDX-License-Identifier: Apache-2.0
"""How much of a link was used while it carried something."""

from __future__ import annotations

from itertools import accumulate, count

import pytest

from sage_kv_connector.bench.ab.spent import busy


def samples(*moved: int) -> list[tuple[float, int]]:
    """One a second, ``moved`` bytes after each."""
    return list(zip(map(float, count()), accumulate((0, *moved)), strict=False))


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        ((0, 0, 40, 100, 100, 30, 0), (200, 2.0)),  # at both ends it carried for a part of the second
        ((0, 50, 100, 50, 0, 0, 50, 100, 100, 50), (300, 3.0)),
        ((100, 100, 100), (100, 1.0)),
        ((100, 100, 60, 100, 100), (260, 3.0)),  # slow is not idle
        ((100, 100, 100, 5, 100, 100, 100), (200, 2.0)),
        ((100, 100), (0, 0.0)),
        ((0, 0, 0, 0), (0, 0.0)),
        ((), (0, 0.0)),
    ],
)
def test_only_seconds_between_busy_ones_count(moved: tuple[int, ...], expected: tuple[int, float]) -> None:
    assert busy(samples(*moved)) == expected
