# SPDX-License-Identifier: Apache-2.0
"""A source serves a converted part when its pages are final, and padding behind the last one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.cache_view import KVCacheView, group_view
from sage_kv_connector.engine.pages.layout import NULL_PAGE
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.source import SelectionError
from sage_kv_connector.engine.session.messages import SubscribePart
from sage_kv_connector.format.wire_format import WireFormat

LAYERS, PAGES, HEADS, PAGE_SIZE, DIM = 2, 32, 1, 4, 8
CACHE = [np.zeros((PAGES, PAGE_SIZE, HEADS, DIM), dtype=np.uint16) for _ in range(LAYERS)]
AXES = ("page", "token", "head", "dim")
VIEW = KVCacheView(
    (
        group_view(
            "fullattention", PAGE_SIZE, PAGES, [(f"l{i}", [("k", c, AXES)]) for i, c in enumerate(CACHE)]
        ),
    )
)


def part(first_token: int, tokens: int, layers: int = LAYERS) -> SubscribePart:
    return SubscribePart(
        "t", 1, b"", 64, 0, 0, layers, 0, HEADS, first_token, tokens, (WireFormat("bf16"),), 1, 1, True,
        False, False, 1,
    )  # fmt: skip


def test_pages_asked_for_behind_the_prompts_end_are_padding() -> None:
    source = PagedSource(VIEW, padding_page=0)
    early = source.part(part(0, 3 * PAGE_SIZE))
    source.append(0, np.array([4]))
    assert early.ready_pages() is None
    source.append(0, np.array([2]))
    assert early.ready_pages() is None, "there may be more to come"
    source.end((2,))
    assert early.ready_pages() == [4, 2, 0]
    assert source.part(part(0, 4 * PAGE_SIZE)).ready_pages() == [4, 2, 0, 0]
    assert source.part(part(3 * PAGE_SIZE, PAGE_SIZE)).ready_pages() == [0]


def test_what_the_engine_allocated_behind_the_prompt_is_not_sent() -> None:
    source = PagedSource(VIEW, padding_page=0)
    source.set_pages(0, np.array([4, 2, 9]))
    source.end((2,))
    source.advance(0, slice(None), 2)
    assert source.part(part(0, 3 * PAGE_SIZE)).ready_pages() == [4, 2, 0]


def test_without_a_padding_page_the_end_is_the_end() -> None:
    source = PagedSource(VIEW)
    source.append(0, np.array([4]))
    source.end((1,))
    cursor = source.part(part(0, 2 * PAGE_SIZE))
    assert cursor.ready_pages() is None
    source.advance(0, slice(None), 2)
    with pytest.raises(SelectionError, match="page 1 of group 0 is beyond the 1 here"):
        cursor.ready_pages()


def test_a_page_that_is_no_longer_kept_is_refused() -> None:
    source = PagedSource(VIEW, padding_page=0)
    source.append(0, np.array([NULL_PAGE, 3]))
    with pytest.raises(SelectionError, match="no longer kept"):
        source.part(part(0, 2 * PAGE_SIZE)).ready_pages()


@given(
    st.lists(st.integers(1, PAGES - 1), min_size=1, max_size=8, unique=True),
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(1, LAYERS),
)
def test_a_part_is_served_once_each_of_its_pages_is_final(
    table: list[int], first_token: int, tokens: int, layers: int
) -> None:
    source = PagedSource(VIEW, padding_page=0)
    cursor = source.part(part(first_token, tokens, layers))
    first, end = first_token // PAGE_SIZE, -(-(first_token + tokens) // PAGE_SIZE)
    for count in range(len(table)):
        source.append(0, np.array([table[count]]))
        assert (cursor.ready_pages() is None) == (count + 1 < end)
    source.end((len(table),))
    padded = table + [0] * 100
    assert cursor.ready_pages() == padded[first:end]
