# SPDX-License-Identifier: Apache-2.0
"""Places of pages as runs and as arrays, and segments one after the other in a window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from sage_kv_connector.backends.base import Descriptors, Segments
from sage_kv_connector.engine.session.transfer_messages import Runs

PageIds = npt.NDArray[np.int64]

#: Page id of a block table entry without memory (outside a sliding window).
NULL_PAGE = -1


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
