# SPDX-License-Identifier: Apache-2.0
"""Any stride order of an engine's tensors comes out as the right bytes of the right page."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.cache_view import KVCacheView, group_view, plane_view, strided_planes
from sage_kv_connector.engine.pages.layout import index_runs, page_indices
from sage_kv_connector.format.converter import ConvertedPlane, GroupConverter, Span
from sage_kv_connector.format.wire_format import WireFormat


def read(segments: npt.NDArray[np.uint64]) -> bytes:
    return b"".join(ctypes.string_at(address, length) for address, length in segments.tolist())


@given(data=st.data())
def test_pages_of_any_axis_order_are_read_in_memory_order(data: st.DataObject) -> None:
    sizes = {"page": 5, "head": 3, "token": 4, "content": 2}
    memory_order = data.draw(st.permutations(list(sizes)))
    shown_order = data.draw(st.permutations(list(sizes)))
    memory = np.arange(np.prod(list(sizes.values())), dtype=np.uint16).reshape(
        [sizes[a] for a in memory_order]
    )
    tensor = memory.transpose([memory_order.index(axis) for axis in shown_order])
    plane = plane_view("kv", tensor, shown_order, 5)
    pages = data.draw(st.lists(st.integers(0, 4), min_size=1, unique=True))
    group = group_view("full", 4, 5, [("layer", [("kv", tensor, shown_order)])])
    got = read(group.layers[0].page_segments(np.array(pages)))
    page_axis = memory_order.index("page")
    expected = b"".join(np.ascontiguousarray(memory.take(page, page_axis)).tobytes() for page in pages)
    assert got == expected
    assert plane.schema.page_bytes * len(pages) == len(expected)
    assert [axis for axis, _ in plane.schema.axes] == [axis for axis in memory_order if axis != "page"]


def test_split_planes_follow_each_other_within_a_page() -> None:
    k = np.arange(6, dtype=np.uint8).reshape(3, 2)
    v = k + 100
    axes = ("page", "content")
    group = group_view("full", 1, 3, [("layer", [("k", k, axes), ("v", v, axes)])])
    assert read(group.layers[0].page_segments(np.array([2, 0]))) == bytes([4, 5, 104, 105, 0, 1, 100, 101])


def test_kernel_blocks_smaller_than_the_tables_are_joined() -> None:
    tensor = np.arange(12, dtype=np.uint8).reshape(6, 2)
    group = group_view("full", 2, 3, [("layer", [("kv", tensor, ("page", "content"))])])
    assert read(group.layers[0].page_segments(np.array([1]))) == bytes([4, 5, 6, 7])


def test_extents_cover_all_pages_and_merge_what_touches() -> None:
    storage = np.zeros((2, 4, 8), dtype=np.uint8)
    axes = ("page", "content")
    group = group_view("full", 1, 4, [(f"layer{i}", [("kv", storage[i], axes)]) for i in range(2)])
    assert KVCacheView((group,)).extents() == [(storage.ctypes.data, storage.nbytes)]


@pytest.mark.parametrize(
    ("axes", "pages", "message"),
    [
        (("page", "token"), 4, "do not name shape"),
        (("token", "head", "content"), 4, "one 'page' axis"),
        (("page", "head", "content"), 3, "no multiple of the 3 pages"),
    ],
)
def test_bad_axes_are_named(axes: tuple[str, ...], pages: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plane_view("kv", np.zeros((4, 2, 2)), axes, pages)


@given(st.sets(st.integers(0, 60)))
def test_index_runs_and_page_indices_are_inverse(indices: set[int]) -> None:
    array = np.array(sorted(indices), dtype=np.int64)
    np.testing.assert_array_equal(page_indices(index_runs(array)), array)


HEADS, TOKENS, DIM, PAGES = 3, 8, 16, 5


def canonical_elements(
    tensor: npt.NDArray[np.float16], name: str, axes: tuple[str, ...], heads: int, page: int
) -> list[npt.NDArray[np.float16]]:
    """What the converter reads of one page: for each canonical plane (head, token, channel)."""
    planes = strided_planes(name, tensor, axes)
    view = plane_view(name, tensor, axes, PAGES)
    found = []
    for plane in planes:
        converted = ConvertedPlane(
            plane.order, view.page_stride, plane.dim, WireFormat("fp16"), [view.base], [1.0], [1.0]
        )
        converter = GroupConverter("fp16", TOKENS, PAGES, heads, [converted])
        span = Span(0, 1, 0, heads, 0, TOKENS, [page])
        wire = np.zeros(converter.wire_bytes(span), np.uint8)
        converter.encode(span, int(wire.ctypes.data), len(wire))
        found.append(wire.view(np.float16).reshape(heads, TOKENS, plane.dim))
    return found


@pytest.mark.parametrize(
    ("axes", "fused"),
    [
        (("page", "head", "token", "content"), True),
        (("page", "token", "head", "content"), True),
        (("plane", "page", "token", "head", "dim"), False),
        (("page", "plane", "head", "token", "dim"), False),
        (("plane", "head", "page", "token", "dim"), False),
    ],
)
def test_every_order_of_k_and_v_is_read_in_canonical_coordinates(axes: tuple[str, ...], fused: bool) -> None:
    logical = np.arange(2 * PAGES * HEADS * TOKENS * DIM, dtype=np.float32).reshape(
        2, PAGES, HEADS, TOKENS, DIM
    )
    logical = (logical % 2039).astype(np.float16)
    if fused:
        whole = np.concatenate([logical[0], logical[1]], axis=-1)
        known: tuple[str, ...] = ("page", "head", "token", "content")
    else:
        whole, known = logical, ("plane", "page", "head", "token", "dim")
    tensor = np.ascontiguousarray(whole.transpose([known.index(axis) for axis in axes]))
    key, value = canonical_elements(tensor, "kv", axes, HEADS, 3)
    np.testing.assert_array_equal(key, logical[0, 3])
    np.testing.assert_array_equal(value, logical[1, 3])


def test_split_planes_latents_and_unknown_axes() -> None:
    rng = np.random.default_rng(0)
    split = rng.normal(size=(PAGES, TOKENS, HEADS, DIM)).astype(np.float16)
    (key,) = canonical_elements(split, "k", ("page", "token", "head", "dim"), HEADS, 2)
    np.testing.assert_array_equal(key, split[2].transpose(1, 0, 2))
    latent = rng.normal(size=(PAGES, TOKENS, 72)).astype(np.float16)
    (found,) = canonical_elements(latent, "latent", ("page", "token", "content"), 1, 4)
    np.testing.assert_array_equal(found[0], latent[4])
    assert strided_planes("kv", split, ("page", "axis1", "head", "dim")) == ()


def test_k_and_v_of_different_width_lie_side_by_side() -> None:
    tensor = np.random.default_rng(4).normal(size=(PAGES, 2, TOKENS, 24)).astype(np.float16)
    axes = ("page", "head", "token", "content")
    key, value = strided_planes("kv", tensor, axes, channels=(16, 8))
    assert (key.dim, value.dim) == (16, 8)
    assert value.order.offset - key.order.offset == 16 * tensor.itemsize
    assert strided_planes("kv", tensor, axes, channels=(16, 16)) == (), "the page holds something else"
