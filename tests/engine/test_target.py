# SPDX-License-Identifier: Apache-2.0
"""Which pages of a target hold which tokens."""

from __future__ import annotations

import numpy as np
import pytest

from sage_kv_connector.engine.pages.target import GroupPages, PagesTarget
from tests.engine.paged_side import PAGE_SIZE, MakeCore, Side


@pytest.mark.parametrize(
    ("first", "tokens", "pages"),
    [
        (2 * PAGE_SIZE, 1, [7]),
        (3 * PAGE_SIZE - 1, 2, [7, 3]),
        (3 * PAGE_SIZE, PAGE_SIZE, [3]),
        (3 * PAGE_SIZE + 1, PAGE_SIZE, [3, 9]),
        (2 * PAGE_SIZE, 3 * PAGE_SIZE, [7, 3, 9]),
    ],
)
def test_pages_of_tokens(make_core: MakeCore, first: int, tokens: int, pages: list[int]) -> None:
    """The request's first two pages are here already."""
    wanted = range(2 * PAGE_SIZE, 5 * PAGE_SIZE)
    target = PagesTarget(Side(make_core(), 1).view, (GroupPages(0, ((2, 3),), np.array([7, 3, 9]), wanted),))
    assert target.pages_of(0, first, tokens) == pages
