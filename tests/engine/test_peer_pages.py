# SPDX-License-Identifier: Apache-2.0
"""Pages of a peer that kernels read in place: what prefill offers of them, and where decode finds them."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.cache_view import GroupView, group_view, strided_planes
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.page_places import GroupPlaces
from sage_kv_connector.contract.peer_view import view_of_peer
from sage_kv_connector.contract.prompt import PromptDigest
from sage_kv_connector.engine.conversion.peer_pages import PeerPages, of_canonical
from sage_kv_connector.engine.pages.paged import PagedSource
from sage_kv_connector.engine.pages.source import Cursor, SelectionError
from sage_kv_connector.engine.session.transfer_messages import PartGroup, SubscribeParts
from sage_kv_connector.engine.transfer.part_sender import read_cursor
from sage_kv_connector.format.wire_format import WireFormat
from tests.engine.converting_side import ConvertingSide, Shape
from tests.engine.device_processes import held_by

Rows = npt.NDArray[np.uint64]
PADDING = 23
#: Axes of an engine's tensor of (pages, 2, tokens, heads, dim) in some order.
ORDERS = (
    ("page", "plane", "token", "head", "dim"),
    ("plane", "page", "token", "head", "dim"),
    ("page", "head", "token", "content"),
    ("head", "page", "token", "content"),
)
SIZES = {"page": 10, "plane": 2, "token": 4, "head": 3, "dim": 8, "content": 16}


def cache_of(axes: tuple[str, ...], layers: int = 3) -> GroupView:
    tensors = [np.zeros([SIZES[axis] for axis in axes], dtype=np.uint16) for _ in range(layers)]
    kept.extend(tensors)
    named = [(f"layers.{i}", [("kv", tensor, axes)]) for i, tensor in enumerate(tensors)]
    planes = strided_planes("kv", tensors[0], axes)
    return group_view("full", SIZES["token"], SIZES["page"], named, heads=SIZES["head"], canonical=planes)


kept: list[Any] = []


def offered(view: GroupView, ids: list[int]) -> Rows:
    """What a cursor hands out: address, offset in the window, bytes; a row a run, layer after layer."""
    runs = np.concatenate([layer.page_segments(np.array(ids)) for layer in view.layers])
    ends = np.cumsum(runs[:, 1])
    return np.stack([runs[:, 0], ends - runs[:, 1], runs[:, 1]], axis=1)


def box_of(view: GroupView, ids: list[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, len(view.layers)), (0, len(ids))


@settings(max_examples=60, deadline=None)
@given(axes=st.sampled_from(ORDERS), ids=st.permutations(range(10)), count=st.integers(1, 10), data=st.data())
def test_pages_are_found_wherever_they_lie(
    axes: tuple[str, ...], ids: list[int], count: int, data: st.DataObject
) -> None:
    view, ids = cache_of(axes), ids[:count]
    told = view_of_peer(view.schema(), 2)
    pages, rows = PeerPages(told, count, 100), offered(view, ids)
    rows[:, 1] += np.uint64(100)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows)))) | {0, len(rows)})
    batches = data.draw(st.permutations([rows[a:b] for a, b in pairwise(cuts)]))
    for number, batch in enumerate(batches):
        assert not pages.whole(box_of(view, ids))
        touched = pages.take(batch)
        assert touched is not None, number
    assert pages.whole(box_of(view, ids))
    bases, places = pages.placed(box_of(view, ids))
    for layer, found in zip(view.layers, of_canonical(bases, told), strict=True):
        for plane, base in zip(view.canonical, found, strict=True):
            real = layer.planes[plane.plane]
            assert [base + place * real.page_stride for place in places] == [
                real.base + page * real.page_stride for page in ids
            ]


def test_rows_of_other_groups_are_left_alone() -> None:
    view = cache_of(ORDERS[0])
    pages = PeerPages(view_of_peer(view.schema(), 2), 2, 1 << 20)
    assert pages.take(offered(view, [1, 2])) is None


@pytest.mark.parametrize("axes", ORDERS)
def test_runs_that_are_not_where_the_schema_says_are_refused(axes: tuple[str, ...]) -> None:
    """Else a kernel would follow an address that nobody offered."""
    view = cache_of(axes)
    rows = offered(view, [3, 1, 2])
    for row in range(len(rows)):
        moved = rows.copy()
        moved[row, 0] += np.uint64(2)
        pages = PeerPages(view_of_peer(view.schema(), 2), 3, 0)
        pages.take(moved)
        with pytest.raises(ValueError, match="the peer's schema says"):
            pages.placed(((0, 3), (0, 3)))


@pytest.mark.parametrize(("start", "length"), [(2, 6), (0, 6), (4, 32)])
def test_a_row_that_ends_inside_of_a_run_is_refused(start: int, length: int) -> None:
    pages = PeerPages(view_of_peer(cache_of(ORDERS[1]).schema(), 2), 2, 0)
    with pytest.raises(ValueError, match="inside of a page's run"):
        pages.take(np.array([[1 << 40, start, length]], dtype=np.uint64))


def test_pages_further_apart_than_ids_count_are_refused() -> None:
    view = cache_of(ORDERS[0])
    rows = offered(view, [1, 2])
    rows[1::2, 0] += np.uint64(view.layers[0].planes[0].page_stride << 31)
    pages = PeerPages(view_of_peer(view.schema(), 2), 2, 0)
    pages.take(rows)
    with pytest.raises(ValueError, match="behind another"):
        pages.placed(((0, 3), (0, 2)))


@pytest.mark.parametrize("axes", ORDERS)
def test_places_that_leave_a_page_are_refused(axes: tuple[str, ...]) -> None:
    """Each number of what a peer tells, one or much larger, and below 0; those that stay inside are its own affair."""
    schema = cache_of(axes).schema()
    view_of_peer(schema, 2)
    told = msgspec.to_builtins(schema.places)
    refused = 0
    for path in _numbers(told):
        for change in (1, 1 << 40, -(1 << 40), 1 << 70):
            places = msgspec.convert(_changed(told, path, change), GroupPlaces)
            try:
                view = view_of_peer(msgspec.structs.replace(schema, places=places), 2)
            except ValueError:
                refused += 1
            else:
                assert change == 1
                _inside(view)
    assert refused > 3 * len(list(_numbers(told)))


def _inside(view: GroupView) -> None:
    """Every element lies in a run of its page."""
    for plane in view.canonical:
        held = view.layers[0].planes[plane.plane]
        covered = np.zeros(int(held.run_offsets.max()) + held.run_bytes, dtype=bool)
        for offset in held.run_offsets:
            covered[offset : offset + held.run_bytes] = True
        order = plane.order
        for head in range(view.heads):
            for token in range(view.page_size):
                at = order.offset + head * order.head_stride
                at += token % order.token[0] * order.token[1] + token // order.token[0] * order.token[2]
                assert covered[at : at + 2 * plane.dim].all() and at + 2 * plane.dim <= len(covered)


def _numbers(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(tree, int):
        yield path
    elif isinstance(tree, dict | list | tuple):
        for key, each in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _numbers(each, (*path, key))


def _changed(tree: Any, path: tuple[Any, ...], by: int) -> Any:
    if not path:
        return tree + by
    if isinstance(tree, dict):
        return tree | {path[0]: _changed(tree[path[0]], path[1:], by)}
    return [_changed(each, path[1:], by) if index == path[0] else each for index, each in enumerate(tree)]


def test_a_peer_that_tells_no_places_is_not_read() -> None:
    schema = msgspec.structs.replace(cache_of(ORDERS[0]).schema(), places=None)
    with pytest.raises(ValueError, match="does not tell how its pages lie"):
        view_of_peer(schema, 2)


# -- what prefill offers


class Asked:
    """A prefill of 3 pages of 16 tokens, and a consumer that asks for tokens of it in place."""

    def __init__(self, padding: int | None = PADDING) -> None:
        self.side: ConvertingSide = held_by(Shape())[0]
        self.source = PagedSource(self.side.view, padding)
        self.source.set_pages(0, np.array([7, 3, 9]))

    def ask(
        self, tokens: int, prompt: int = 0, *, device_memory: bool = True, nbytes: int = 0, **changes: Any
    ) -> Cursor:
        formats = (WireFormat("bf16"),) * 2
        pages = -(-tokens // 16)
        request = SubscribeParts(
            "t", 1, nbytes or pages * 4 * self.side.page_bytes, (PartGroup(0, ((0, 4),), 0, tokens, formats),),
            0, 4, 1 << 20, False, True, 1000, 1, PromptDigest(prompt, b""), 0, b"D",
        )  # fmt: skip
        request = msgspec.structs.replace(request, **changes)
        capabilities = SimpleNamespace(device_memory=device_memory, name="tcp")
        session: Any = SimpleNamespace(backend=SimpleNamespace(capabilities=capabilities))
        here: Any = SimpleNamespace(schema=self.side.schema)
        return read_cursor(request, self.source, session, here)

    def taken(self, cursor: Cursor) -> list[list[int]]:
        ready = cursor.take_ready()
        return [] if ready is None else ready[:, [0, 2]].tolist()

    def segments(self, ids: list[int], layers: slice = slice(None)) -> list[list[int]]:
        found = [layer.page_segments(np.array(ids)) for layer in self.side.view.groups[0].layers[layers]]
        return np.concatenate(found).tolist()  # type: ignore[no-any-return]


def test_a_read_gets_whole_pages_as_they_become_final() -> None:
    asked = Asked()
    cursor = asked.ask(40)
    assert asked.taken(cursor) == []
    asked.source.advance(0, slice(0, 1), 2)
    assert asked.taken(cursor) == asked.segments([7, 3], slice(0, 1))
    asked.source.advance_all((3,))
    assert sorted(asked.taken(cursor)) == sorted(
        asked.segments([9], slice(0, 1)) + asked.segments([7, 3, 9], slice(1, None))
    )
    assert cursor.exhausted
    assert [one.parts[:, 4].sum() for one in asked.source.converted] == [40]


def test_behind_the_prompt_comes_padding_once_its_end_is_known() -> None:
    asked = Asked()
    cursor = asked.ask(64, prompt=41)
    asked.source.advance_all((3,))
    assert asked.taken(cursor) == asked.segments([7, 3, 9]) and not cursor.exhausted
    asked.source.end((3,))
    assert asked.taken(cursor) == asked.segments([PADDING]) and cursor.exhausted


def test_pages_behind_the_end_are_padding_though_the_table_has_them() -> None:
    asked = Asked()
    asked.source.advance_all((2,))
    asked.source.end((2,))
    cursor = asked.ask(64, prompt=32)
    assert asked.taken(cursor) == asked.segments([7, 3, PADDING, PADDING])


@pytest.mark.parametrize(("padding", "prompt", "number"), [(PADDING, 49, 4), (None, 41, 4)])
def test_what_prefill_does_not_have_is_refused(padding: int | None, prompt: int, number: int) -> None:
    asked = Asked(padding)
    asked.source.advance_all((3,))
    asked.source.end((3,))
    cursor = asked.ask(64, prompt=prompt)
    said = f"prefill ended with 3 pages of group 0, number {number} asked for"
    with pytest.raises(SelectionError, match=said) as error:
        cursor.take_ready()
    assert error.value.reason.code is Code.TOKENS


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"nbytes": 5}, "nbytes: the pages hold"),
        ({"first_head": 3}, "heads: 0 to 3 here, 3 to 6 asked for"),
        ({"device_memory": False}, "nobody reads pages in place over tcp"),
    ],
)
def test_a_read_that_does_not_fit_this_cache_names_the_field(how: dict[str, Any], said: str) -> None:
    with pytest.raises(SelectionError, match=said):
        Asked().ask(40, **how)
