# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of a worker's pages lie, relative to each page: for a peer that reads them in place.

A group tells its *places* in its schema. What a peer told is checked once (``peer_view``), so that whoever follows it
stays inside the runs of a page. Where the pages are, each transfer says.
"""

from __future__ import annotations

import msgspec

from sage_kv_connector.contract.element_order import ElementOrder

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
