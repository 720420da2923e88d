# SPDX-License-Identifier: Apache-2.0
"""Items of memory on offer: a subscription gets exactly those that it selects, in their order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.engine.pages.layout import index_runs
from sage_kv_connector.engine.pages.memory import ItemSource
from sage_kv_connector.engine.pages.source import SelectionError
from sage_kv_connector.engine.session.messages import PageRuns

ITEMS = [np.array([[1000 * i + j, i + 1] for j in range(i % 3 + 1)], dtype=np.uint64) for i in range(9)]


def taken(selection: tuple[PageRuns, ...], nbytes: int) -> list[list[int]]:
    cursor = ItemSource(ITEMS).cursor(selection, nbytes)
    descriptors = cursor.take_ready()
    assert descriptors is not None and cursor.exhausted and cursor.take_ready() is None
    rows: list[list[int]] = descriptors.tolist()
    return rows


@given(st.sets(st.integers(0, 8), min_size=1).map(sorted))
def test_selected_items_follow_each_other(chosen: list[int]) -> None:
    segments = [row for i in chosen for row in ITEMS[i].tolist()]
    selection = (PageRuns(0, index_runs(np.array(chosen, dtype=np.int64))),)
    rows = taken(selection, sum(length for _, length in segments))
    assert [[address, length] for address, _, length in rows] == segments
    ends = np.cumsum([length for *_, length in rows]).tolist()
    assert [offset for _, offset, _ in rows] == [0, *ends[:-1]]


def test_no_selection_is_all_of_them() -> None:
    total = sum(int(item[:, 1].sum()) for item in ITEMS)
    assert len(taken((), total)) == sum(len(item) for item in ITEMS)


@pytest.mark.parametrize(
    ("selection", "nbytes", "says"),
    [
        ((PageRuns(1, ((0, 1),)),), 1, "pages of group 0"),
        ((PageRuns(0, ((0, 1),)), PageRuns(1, ((0, 1),))), 1, "pages of group 0"),
        ((PageRuns(0, ((8, 2),)),), 1, "items: 9 here, up to 10 asked for"),
        ((PageRuns(0, ((0, 1),)),), 7, "nbytes: 1 offered, 7 asked for"),
        ((PageRuns(0, ()),), 5, "nbytes: 0 offered, 5 asked for"),
    ],
)
def test_what_is_not_there_is_named(selection: tuple[PageRuns, ...], nbytes: int, says: str) -> None:
    with pytest.raises(SelectionError, match=says):
        ItemSource(ITEMS).cursor(selection, nbytes)
