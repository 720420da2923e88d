# SPDX-License-Identifier: Apache-2.0
"""Places of pages as runs and as arrays, segments one after the other in a window, and a view as lanes know it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Descriptors, Segments
from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.engine.session.transfer_messages import Runs

PageIds = npt.NDArray[np.int64]

#: Page id of a block table entry without memory (outside a sliding window).
NULL_PAGE = -1

_layouts: WeakKeyDictionary[KVCacheView, _data_plane.PageLayout] = WeakKeyDictionary()


def page_indices(runs: Runs) -> PageIds:
    """(first, count) runs as one ascending array."""
    if not runs:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.arange(first, first + count, dtype=np.int64) for first, count in runs])


def index_runs(indices: Sequence[int] | PageIds) -> Runs:
    """The inverse of ``page_indices``; ``indices`` ascend."""
    if not len(indices):
        return ()
    places = np.asarray(indices, dtype=np.int64)
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    starts = np.concatenate([[0], cuts])
    ends = np.concatenate([cuts, [len(places)]])
    return tuple((int(places[a]), int(b - a)) for a, b in zip(starts, ends, strict=True))


def gathered_segments(items: Sequence[Segments], chosen: Iterable[int]) -> Segments:
    """The segments of the chosen items, one after the other; shape (n, 2)."""
    return joined_segments([items[int(index)] for index in chosen])


def joined_segments(parts: Sequence[Segments]) -> Segments:
    """All rows, one after the other; shape (n, 2), also for none."""
    return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.uint64)


def placed(segments: Segments, offset: int) -> Descriptors:
    """Descriptors that put ``segments`` one after the other into the window from ``offset``."""
    lengths = segments[:, 1]
    descriptors = np.empty((len(segments), 3), dtype=np.uint64)
    descriptors[:, 0] = segments[:, 0]
    descriptors[:, 1] = np.uint64(offset) + np.cumsum(lengths) - lengths
    descriptors[:, 2] = lengths
    return descriptors


def page_layout(view: KVCacheView) -> _data_plane.PageLayout:
    """The view's planes for the data plane; made once."""
    known = _layouts.get(view)
    if known is None:
        groups = [
            (
                group.pages,
                [
                    [(p.base, p.page_stride, p.run_bytes, p.run_offsets.tolist()) for p in layer.planes]
                    for layer in group.layers
                ],
            )
            for group in view.groups
        ]
        known = _layouts[view] = _data_plane.PageLayout(groups, view.extents())
    return known
