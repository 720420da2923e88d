# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a worker's pages lie, relative to each page: for a peer that reads them in place.

A group tells its *places* in its schema. What a peer told is checked once (``peer_view``), so that whoever follows it
stays inside the runs of a page. Where the pages are, each transfer says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from sage_kv_connector.contract.element_order import ElementOrder

if TYPE_CHECKING:
    from sage_kv_connector.contract.cache_view import GroupView

#: A group whose pages lie in more runs than these does not tell its places.
MAX_RUNS = 1024


class PlanePlaces(msgspec.Struct, frozen=True):
    """Of one plane: bytes from page to page, and the runs of ``run_bytes`` that a page lies in, ascending from 0."""

    page_stride: int
    run_offsets: tuple[int, ...]
    run_bytes: int


class GroupPlaces(msgspec.Struct, frozen=True):
    """``orders``: of each canonical plane the number of its plane, and how elements lie there. ``heads``: of a page."""

    heads: int
    planes: tuple[PlanePlaces, ...]
    orders: tuple[tuple[int, ElementOrder], ...]


def places_of(view: GroupView) -> GroupPlaces | None:
    """What a group tells; None where it has no canonical planes, or pages of more than ``MAX_RUNS`` runs."""
    planes = view.layers[0].planes
    if not view.canonical or sum(len(plane.run_offsets) for plane in planes) > MAX_RUNS:
        return None
    return GroupPlaces(
        view.heads,
        tuple(
            PlanePlaces(plane.page_stride, tuple(plane.run_offsets.tolist()), plane.run_bytes)
            for plane in planes
        ),
        tuple((plane.plane, plane.order) for plane in view.canonical),
    )
