# SPDX-License-Identifier: Apache-2.0
"""Which pages hold which tokens of a request that ended."""

from __future__ import annotations

import numpy as np
import pytest

from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.source import SelectionError
from sage_kv_connector.engine.session.messages import PageRuns
from tests.engine.paged_side import PAGE_SIZE, MakeCore, Side


@pytest.fixture
def source(make_core: MakeCore) -> PagedSource:
    made = PagedSource(Side(make_core(), 1).view, padding_page=15)
    made.set_pages(0, np.array([7, 3, 9]))
    made.advance_all((3,))
    made.end((3,))
    return made


@pytest.mark.parametrize(
    ("tokens", "pages"),
    [
        (range(1), [7]),
        (range(PAGE_SIZE), [7]),
        (range(PAGE_SIZE + 1), [7, 3]),
        (range(PAGE_SIZE - 1, PAGE_SIZE + 1), [7, 3]),
        (range(2 * PAGE_SIZE + 3, 2 * PAGE_SIZE + 4), [9]),
        (range(2 * PAGE_SIZE, 4 * PAGE_SIZE), [9, 15]),
    ],
)
def test_pages_of_tokens(source: PagedSource, tokens: range, pages: list[int]) -> None:
    assert source.token_pages().pages_of(0, tokens.start, len(tokens)) == pages


def test_appended_pages_are_final(make_core: MakeCore) -> None:
    made = PagedSource(Side(make_core(), 1).view)
    made.append(0, np.array([4, 2]))
    made.append(0, np.array([8]))
    made.end_here()
    cursor = made.cursor((PageRuns(0, ((0, 3),)),), 3 * sum(layer_bytes(made)))
    ready = cursor.take_ready()
    assert ready is not None and int(ready[:, 2].sum()) == 3 * sum(layer_bytes(made)) and cursor.exhausted
    assert made.token_pages().pages_of(0, 0, 3 * PAGE_SIZE) == [4, 2, 8]


def test_who_asks_for_more_than_there_will_be_waits_no_longer_than_until_the_end(make_core: MakeCore) -> None:
    made = PagedSource(Side(make_core(), 1).view)
    made.append(0, np.array([4, 2]))
    cursor = made.cursor((PageRuns(0, ((0, 3),)),), 3 * sum(layer_bytes(made)))
    ready = cursor.take_ready()
    assert ready is not None and int(ready[:, 2].sum()) == 2 * sum(layer_bytes(made))
    assert cursor.take_ready() is None and not cursor.exhausted
    made.end_here()
    with pytest.raises(SelectionError, match="prefill ended with 2 pages of group 0, number 3 asked for"):
        cursor.take_ready()


def layer_bytes(source: PagedSource) -> list[int]:
    """Of one page in each layer."""
    one = np.array([0])
    return [int(layer.page_segments(one)[:, 1].sum()) for layer in source.token_pages().view.groups[0].layers]
