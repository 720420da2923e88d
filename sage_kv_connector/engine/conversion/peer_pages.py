# SPDX-License-Identifier: Apache-2.0
"""Where the pages of a peer's group lie in this process, as its offers tell, run by run.

A window over a peer's pages is linear: layer after layer, in a layer page after page, in a page plane after plane, in a
plane its runs. So an offered row says where some neighbouring runs are. Kernels are given a layer's first address and
page ids instead: both are found here, and every run is compared with them, so that no kernel follows what was not
offered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.peer_view import PEER_PAGES

I64 = npt.NDArray[np.int64]
#: (first layer, behind the last), (first page, behind the last).
Box = tuple[tuple[int, int], tuple[int, int]]


class PeerPages:
    """``count`` neighbouring pages of every layer of ``view``, whose window bytes begin at ``start``."""

    def __init__(self, view: GroupView, count: int, start: int) -> None:
        planes = view.layers[0].planes
        self._strides = [plane.page_stride for plane in planes]
        self._runs = [plane.run_offsets for plane in planes]
        lengths = [plane.run_bytes for plane in planes for _ in plane.run_offsets]
        ends = np.cumsum(np.array(lengths, dtype=np.int64))
        self._offsets = ends - lengths  # of a page's runs, in the window
        self._page_bytes = int(ends[-1])
        self._count = count
        self.start = start
        self.end = start + len(view.layers) * count * self._page_bytes
        #: Addresses, 0 where none was told: layers, pages, runs of a page.
        self._addresses = np.zeros((len(view.layers), count, len(lengths)), dtype=np.int64)

    def take(self, rows: npt.NDArray[np.uint64]) -> Box | None:
        """Rows as of ``Read``, those of other groups too; what of the pages they touch, None for nothing.

        Raises ValueError for a row that begins or ends inside of a run.
        """
        address, offset, length = (rows[:, column].astype(np.int64) for column in range(3))
        first, last = np.maximum(offset, self.start), np.minimum(offset + length, self.end)
        here = first < last
        if not here.any():
            return None
        begin, stop = first[here] - self.start, last[here] - self.start
        origin = address[here] - offset[here] + self.start  # of a row: its address less its offset
        from_run, to_run = self._run_at(begin), self._run_at(stop)
        counts = to_run - from_run
        before = np.cumsum(counts) - counts
        runs = np.repeat(from_run - before, counts) + np.arange(int(counts.sum()))
        page, inside = np.divmod(runs, len(self._offsets))
        self._addresses.reshape(-1)[runs] = (
            np.repeat(origin, counts) + page * self._page_bytes + self._offsets[inside]
        )
        layers, pages = np.divmod(page, self._count)
        if int(layers[0]) == int(layers[-1]):
            return (int(layers[0]), int(layers[0]) + 1), (int(pages.min()), int(pages.max()) + 1)
        return (int(layers.min()), int(layers.max()) + 1), (0, self._count)

    def whole(self, box: Box) -> bool:
        """Whether every run of these pages was told."""
        (first, end), (page, last) = box
        return bool((self._addresses[first:end, page:last] != 0).all())

    def placed(self, box: Box) -> tuple[list[list[int]], list[int]]:
        """Of pages that were told: addresses of page 0 by layer and plane, and page ids that count from there.

        Raises ValueError where runs don't lie in their page, or pages in their plane, as the peer told.
        """
        (first, end), (page, last) = box
        told = self._addresses[first:end, page:last]
        column, starts = 0, []
        for offsets in self._runs:
            start = told[:, :, column]
            if (told[:, :, column : column + len(offsets)] != start[:, :, None] + offsets).any():
                raise ValueError("the runs of a page don't lie where the peer's schema says")
            starts.append(start)
            column += len(offsets)
        lowest = int(starts[0][0].argmin())
        ids: I64 = (starts[0][0] - starts[0][0, lowest]) // self._strides[0]
        if int(ids.max()) >= PEER_PAGES:
            raise ValueError(f"a page is {int(ids.max())} behind another, at most {PEER_PAGES - 1}")
        for start, stride in zip(starts, self._strides, strict=True):
            if (start - start[:, lowest, None] != ids * stride).any():
                raise ValueError("pages don't follow each other as far apart as the peer's schema says")
        bases = np.stack([start[:, lowest] for start in starts], axis=1)
        return bases.tolist(), ids.tolist()

    def _run_at(self, place: I64) -> I64:
        """Number of the run that begins at each place of the pages' bytes."""
        page, inside = np.divmod(place, self._page_bytes)
        run = np.searchsorted(self._offsets, inside)
        if (self._offsets[np.minimum(run, len(self._offsets) - 1)] != inside).any():
            raise ValueError("an offer begins or ends inside of a page's run")
        found: I64 = page * len(self._offsets) + run
        return found


def of_canonical(bases: Sequence[Sequence[int]], view: GroupView) -> list[list[int]]:
    """By canonical plane what ``PeerPages.placed`` tells by plane."""
    return [[layer[plane.plane] for plane in view.canonical] for layer in bases]
