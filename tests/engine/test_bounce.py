# SPDX-License-Identifier: Apache-2.0
"""Copies between device pages and their host image: exactly the box's bytes, in as few copies as they allow."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.cache_view import CanonicalPlane, group_view
from sage_kv_connector.contract.element_order import ElementOrder, strided
from sage_kv_connector.engine.conversion.bounce import Bounce, DeviceGroup, bounce, bounce_bytes, device_group
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.format.wire_format import WireFormat

HEADS, DIM, ITEM, PAGES, LAYERS = 4, 8, 2, 12, 2
ROW = DIM * ITEM
BF16 = WireFormat("bf16")


class Layout(NamedTuple):
    """A cache in host memory that stands for a device's: one or two tensors a layer, of whole pages."""

    planes: list[ConvertedPlane]
    memory: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]
    size: int

    def group(self) -> DeviceGroup:
        names = [f"l{i}" for i in range(LAYERS)]
        tensor = np.zeros((PAGES, 1), np.uint8)
        layers = [(name, [("kv", tensor, ("page", "content"))]) for name in names]
        canonical = tuple(CanonicalPlane(name, DIM, 0, strided(0, 0, 0, ITEM)) for name in ("k", "v"))
        view = group_view("full", self.size, PAGES, layers, heads=HEADS, canonical=canonical)
        return DeviceGroup(view, "bf16", tuple(self.planes))


def layout(kind: str, size: int, gap: int = 0) -> Layout:
    """``gap``: bytes between two pages."""
    plane = HEADS * size * ROW
    if kind == "rows":  # [page, head, token, 2 dim]: K and V of a token side by side
        orders = [strided(at, size * 2 * ROW, 2 * ROW, ITEM) for at in (0, ROW)]
    elif kind == "halves":  # [page, 2, token, head, dim]
        orders = [strided(at, ROW, HEADS * ROW, ITEM) for at in (0, plane)]
    elif kind == "outermost":  # [head, page, token, 2 dim]
        head = PAGES * (size * 2 * ROW + gap)
        orders = [strided(at, head, 2 * ROW, ITEM) for at in (0, ROW)]
    else:  # K and V each a tensor of its own, heads outermost in the page
        orders = [strided(0, size * ROW, ROW, ITEM)] * 2
    tensors = 2 if kind == "apart" else 1
    stride = (1 if kind == "apart" else 2) * plane + gap
    rng = np.random.default_rng(size)
    if kind == "outermost":
        stride = size * 2 * ROW + gap
    nbytes = PAGES * stride * (HEADS if kind == "outermost" else 1)
    memory = [rng.integers(0, 256, (nbytes,), dtype=np.uint8) for _ in range(tensors * LAYERS)]
    planes = []
    for number, order in enumerate(orders):
        own = [memory[layer * tensors + (number if tensors == 2 else 0)] for layer in range(LAYERS)]
        bases = [int(one.ctypes.data) for one in own]
        planes.append(ConvertedPlane(order, stride, DIM, BF16, bases, [1.0] * LAYERS, [1.0] * LAYERS))
    return Layout(planes, memory, size)


def staged(group: DeviceGroup, span: Span) -> tuple[Bounce, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """The bounce after the copies to the host; bytes that no copy wrote are 0xEE."""
    room = np.full(bounce_bytes(group, span) + 512, 0xEE, np.uint8)
    made = bounce(group, span, -(-int(room.ctypes.data) // 256) * 256)
    assert made.nbytes == bounce_bytes(group, span)
    for device, host, nbytes in made.pairs.tolist():
        assert room.ctypes.data <= host and host + nbytes <= room.ctypes.data + len(room)
        source = (ctypes.c_uint8 * nbytes).from_address(device)
        room[host - room.ctypes.data : host - room.ctypes.data + nbytes] = source
    return made, room


def in_box(one: Layout, span: Span) -> set[int]:
    """Device addresses of the box's elements, one by one."""
    found: set[int] = set()
    origin = span.first_token // one.size
    for layer in range(span.first_layer, span.first_layer + span.layers):
        for plane in one.planes:
            for token in range(span.first_token, span.first_token + span.tokens):
                page = span.pages[token // one.size - origin]
                for head in range(span.first_head, span.first_head + span.heads):
                    at = _place(plane.order, head, token % one.size)
                    start = plane.bases[layer] + page * plane.page_stride + at
                    found.update(range(start, start + ROW))
    return found


def _place(order: ElementOrder, head: int, token: int) -> int:
    return order.offset + head * order.head_stride + token * order.token[1]


@given(
    kind=st.sampled_from(["rows", "halves", "apart", "outermost"]),
    size=st.sampled_from([4, 16]),
    gap=st.sampled_from([0, 64]),
    heads=st.tuples(st.integers(0, HEADS - 1), st.integers(1, HEADS)),
    tokens=st.tuples(st.integers(0, 40), st.integers(1, 60)),
    layers=st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)),
    seed=st.integers(0, 99),
)
def test_copies_hold_the_box_and_nothing_else(
    kind: str,
    size: int,
    gap: int,
    heads: tuple[int, int],
    tokens: tuple[int, int],
    layers: tuple[int, int],
    seed: int,
) -> None:
    one = layout(kind, size, gap)
    first, count = tokens[0] % (size * 4), tokens[1] % (size * 6) + 1
    pages_needed = -(-(first % size + count) // size)
    pages = np.random.default_rng(seed).permutation(PAGES)[:pages_needed].tolist()
    first_head, first_layer = heads[0], layers[0]
    span = Span(
        first_layer,
        min(layers[1], LAYERS - first_layer),
        first_head,
        min(heads[1], HEADS - first_head),
        first,
        count,
        pages,
    )
    group = one.group()
    made, room = staged(group, span)
    copied = [at for device, _, nbytes in made.pairs.tolist() for at in range(device, device + nbytes)]
    assert len(copied) == len(set(copied)) and set(copied) == in_box(one, span)
    # What is read from the image is what is read from the pages.
    direct = GroupConverter("bf16", size, PAGES, HEADS, one.planes)
    wire = [np.zeros(direct.wire_bytes(span), np.uint8) for _ in range(2)]
    direct.encode(span, wire[0].ctypes.data, len(wire[0]))
    made.converter.encode(made.span, wire[1].ctypes.data, len(wire[1]))
    assert np.array_equal(wire[0], wire[1])
    # And back: elements of the box alone come back to the pages.
    before = [memory.copy() for memory in one.memory]
    made.converter.decode(made.span, wire[1].ctypes.data, len(wire[1]))
    for device, host, nbytes in made.pairs.tolist():
        there = (ctypes.c_uint8 * nbytes).from_address(device)
        there[:] = room[host - room.ctypes.data : host - room.ctypes.data + nbytes].tolist()
    assert all(np.array_equal(*pair) for pair in zip(before, one.memory, strict=True))


@pytest.mark.parametrize(
    ("kind", "gap", "pages", "copies"),
    [
        ("rows", 0, [9, 2, 5], 3),  # a page that is needed whole is one copy, planes and all
        ("halves", 0, [9, 2, 5], 3),
        ("apart", 0, [9, 2, 5], 6),
        ("rows", 0, [3, 4, 5], 1),  # pages that follow one another are one
        ("halves", 64, [3, 4, 5], 3),  # unless something lies between
        ("apart", 0, [3, 4, 5], 2),
        ("outermost", 0, [9, 2, 5], HEADS * 3),  # one for each head
    ],
)
def test_whole_pages_are_one_copy(kind: str, gap: int, pages: list[int], copies: int) -> None:
    one = layout(kind, 16, gap)
    made, _ = staged(one.group(), Span(0, LAYERS, 0, HEADS, 0, 48, pages))
    assert len(made.pairs) == LAYERS * copies
    assert int(made.pairs[:, 2].sum()) == LAYERS * 2 * HEADS * 48 * ROW


def test_a_head_of_interleaved_rows_is_one_copy_a_page() -> None:
    made, _ = staged(layout("rows", 16).group(), Span(0, 1, 1, 1, 0, 32, [7, 3]))
    assert made.pairs[:, 2].tolist() == [2 * 16 * ROW] * 2


def test_a_page_whose_planes_begin_behind_something_else_is_one_copy() -> None:
    """As much lies in front of the planes as they have themselves."""
    one = layout("rows", 16, gap=2 * HEADS * 16 * ROW)
    front = 2 * HEADS * 16 * ROW
    planes = [
        plane._replace(order=plane.order._replace(offset=plane.order.offset + front)) for plane in one.planes
    ]
    made, _ = staged(one._replace(planes=planes).group(), Span(0, 1, 0, HEADS, 0, 32, [7, 3]))
    assert made.pairs[:, 2].tolist() == [front] * 2


def test_planes_of_one_tensor_that_share_no_page_are_copied_by_themselves() -> None:
    """[2, page, token, head, dim]: all K pages, then all V pages; an image of both would be the whole cache."""
    one = layout("apart", 16)
    plane = PAGES * one.planes[0].page_stride
    memory = np.zeros(2 * plane, np.uint8)
    bases = [int(memory.ctypes.data)] * LAYERS
    key = one.planes[0]._replace(bases=bases)
    value = key._replace(order=key.order._replace(offset=plane))
    group = one._replace(planes=[key, value], memory=[memory]).group()
    span = Span(0, 1, 0, HEADS, 0, 32, [7, 3])
    assert bounce_bytes(group, span) == 2 * 2 * key.page_stride
    made, _ = staged(group, span)
    assert len(made.pairs) == 4


@pytest.mark.parametrize("gap", [0, 64])
def test_a_bounce_of_pages_with_heads_outermost_has_no_room_for_what_lies_between(gap: int) -> None:
    group = layout("outermost", 16, gap).group()
    assert bounce_bytes(group, Span(0, LAYERS, 0, HEADS, 0, 32, [7, 3])) == LAYERS * 2 * HEADS * 16 * 2 * ROW


@given(split=st.sampled_from([2, 4]), tokens=st.tuples(st.integers(0, 40), st.integers(1, 60)))
def test_pages_of_smaller_blocks_are_copied_like_whole_ones(split: int, tokens: tuple[int, int]) -> None:
    size = 16
    one = layout("halves", size // split)
    planes = [
        plane._replace(
            page_stride=split * plane.page_stride,
            order=plane.order._replace(token=(size // split, plane.order.token[1], plane.page_stride)),
        )
        for plane in one.planes
    ]
    group = device_group(one.group().view._replace(page_size=size, pages=PAGES // split), "bf16", planes)
    assert group.split == split and group.planes == tuple(one.planes)
    pages = [2, 0, 1][: -(-(tokens[0] % size + tokens[1] % 30 + 1) // size)]
    span = Span(0, LAYERS, 0, HEADS, tokens[0] % size, tokens[1] % 30 + 1, pages)
    inside = group.in_blocks(span)
    by_kernels = GroupConverter("bf16", size // split, PAGES, HEADS, one.planes)
    by_tables = GroupConverter("bf16", size, PAGES // split, HEADS, planes)
    wire = [np.zeros(by_tables.wire_bytes(span), np.uint8) for _ in range(2)]
    by_tables.encode(span, wire[0].ctypes.data, len(wire[0]))
    by_kernels.encode(inside, wire[1].ctypes.data, len(wire[1]))
    assert np.array_equal(wire[0], wire[1])
