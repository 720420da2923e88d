# SPDX-License-Identifier: Apache-2.0
"""A peer's group of pages as a view, of the places that it told: checked, since who follows it reads that memory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.cache_view import CanonicalPlane, GroupView, LayerView, PlaneView
from sage_kv_connector.contract.element_order import ElementOrder
from sage_kv_connector.contract.page_places import MAX_RUNS, PlanePlaces
from sage_kv_connector.contract.schema import GroupSchema

#: No offset, stride or count is larger, nor has a page more rows (the channels of one head of one token).
MAX_BYTES, MAX_ROWS = 1 << 36, 1 << 20
#: Pages that a view of a peer's group has room for: page ids are int32.
PEER_PAGES = (1 << 31) - 1


def view_of_peer(group: GroupSchema, item: int) -> GroupView:
    """A peer's group as a view whose layers begin at address 0; ``item``: bytes of an element.

    Raises ValueError naming the field where it did not tell its places, and where an element would lie outside of them.
    """
    places = group.places
    if places is None:
        raise ValueError("the peer does not tell how its pages lie in memory")
    for name, count, known in (
        ("planes", len(places.planes), len(group.planes)),
        ("orders", len(places.orders), len(group.canonical)),
    ):
        if count != known or not known:
            raise ValueError(f"places have {count} {name}, the group {known}")
    rows = places.heads * group.page_size
    if not (places.heads > 0 and 0 < rows <= MAX_ROWS):
        raise ValueError(f"heads are {places.heads} of {group.page_size} tokens, allowed: {MAX_ROWS} rows")
    views = []
    for plane, told in zip(group.planes, places.planes, strict=True):
        _check_runs(told, plane.page_bytes)
        views.append(
            PlaneView(
                plane,
                0,
                told.page_stride,
                PEER_PAGES,
                np.array(told.run_offsets, dtype=np.int64),
                told.run_bytes,
            )
        )
    canonical = []
    for known_plane, (number, order) in zip(group.canonical, places.orders, strict=True):
        if not 0 <= number < len(views):
            raise ValueError(f"plane is {number}, the group has {len(views)}")
        _check_elements(views[number], order, places.heads, group.page_size, known_plane.dim * item, item)
        canonical.append(CanonicalPlane(known_plane.name, known_plane.dim, number, order))
    layers = tuple(LayerView(name, tuple(views)) for name in group.layers)
    return GroupView(
        group.kind,
        group.page_size,
        PEER_PAGES,
        layers,
        places.heads,
        tuple(canonical),
        group.scales,
        group.dtype,
    )


def _check_runs(told: PlanePlaces, page_bytes: int) -> None:
    offsets = told.run_offsets
    if not (0 < told.page_stride <= MAX_BYTES and 0 < told.run_bytes <= MAX_BYTES):
        raise ValueError(
            f"page_stride is {told.page_stride}, run_bytes {told.run_bytes}, allowed: 1 to {MAX_BYTES}"
        )
    if not 0 < len(offsets) <= MAX_RUNS or len(offsets) * told.run_bytes != page_bytes:
        raise ValueError(f"{len(offsets)} runs of {told.run_bytes} bytes are no page of {page_bytes}")
    steps = [after - before for before, after in pairwise(offsets)]
    if offsets[0] != 0 or offsets[-1] > MAX_BYTES or any(step < told.run_bytes for step in steps):
        raise ValueError(f"run_offsets are {offsets[:4]} …, must ascend from 0 and not overlap")


def _check_elements(
    plane: PlaneView, order: ElementOrder, heads: int, tokens: int, row_bytes: int, item: int
) -> None:
    """Whether each row (the channels of one head of one token) lies in one run of a page."""
    if not 0 < row_bytes <= MAX_BYTES:
        raise ValueError(f"dim is {row_bytes // item}, allowed: 1 to {MAX_BYTES // item}")
    numbers = (order.offset, order.head_stride, *order.token, *order.channel)
    if any(not 0 <= number <= MAX_BYTES for number in numbers) or 0 in (order.token[0], order.channel[0]):
        raise ValueError(f"order is {order}, allowed: 0 to {MAX_BYTES}, tiles of at least 1")
    tile, inner, outer = order.channel
    if inner != item or (tile * item < row_bytes and outer != tile * item):
        raise ValueError(f"order of channels is {order.channel}: they are not neighbours of {item} bytes")
    token = np.arange(tokens, dtype=np.int64)
    within = token % order.token[0] * order.token[1] + token // order.token[0] * order.token[2]
    starts: npt.NDArray[np.int64] = (
        order.offset + np.arange(heads, dtype=np.int64)[:, None] * order.head_stride + within
    ).reshape(-1)
    run = np.searchsorted(plane.run_offsets, starts, side="right") - 1
    # Neighbouring runs that touch were one.
    if (starts + row_bytes > plane.run_offsets[run] + plane.run_bytes).any():
        raise ValueError(f"order is {order}: elements lie outside of the runs of a page")
