# SPDX-License-Identifier: Apache-2.0
"""A window over device memory: where incoming ranges go, and which bytes arrived."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.devices.runtime import Copies

#: uint64 (n, 3): source address, offset in the window, bytes.
Incoming = npt.NDArray[np.uint64]


class Claims:
    """Which bytes of a window came."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.claimed = 0
        self._runs: list[tuple[int, int]] = []  # disjoint, ascending

    def take(self, incoming: Incoming) -> Incoming:
        """The rows by their offsets. Raises ValueError for one that leaves the window or overlaps another."""
        ordered = incoming[np.argsort(incoming[:, 1], kind="stable")]
        start = ordered[:, 1].astype(np.int64)
        end = start + ordered[:, 2].astype(np.int64)
        if start[0] < 0 or (end > self.size).any() or (end <= start).any():
            raise ValueError(
                f"bytes {int(start.min())} to {int(end.max())} are outside a window of {self.size}"
            )
        if (start[1:] < end[:-1]).any():
            raise ValueError("two ranges of one offer overlap")
        self._claim(start, end)
        self.claimed += int((end - start).sum())
        return ordered

    def _claim(self, start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> None:
        joined = np.flatnonzero(start[1:] != end[:-1])
        runs = list(
            zip(
                start[np.concatenate([[0], joined + 1])].tolist(),
                end[np.concatenate([joined, [len(end) - 1]])].tolist(),
                strict=True,
            )
        )
        merged: list[tuple[int, int]] = []
        for run in sorted(self._runs + runs):
            if merged and run[0] < merged[-1][1]:
                raise ValueError(f"bytes from {run[0]} on came before")
            if merged and run[0] == merged[-1][1]:
                merged[-1] = (merged[-1][0], run[1])
            else:
                merged.append(run)
        self._runs = merged


class DeviceWindow:
    """Segments of device memory as one linear space; each byte may arrive once."""

    def __init__(self, connection: int, segments: Segments, generation: int) -> None:
        self.connection, self.generation = connection, generation
        self._addresses = segments[:, 0].astype(np.int64)
        ends = np.cumsum(segments[:, 1].astype(np.int64))
        self._starts = ends - segments[:, 1].astype(np.int64)
        self.size = int(ends[-1]) if len(ends) else 0
        self.landed = 0
        self.jobs: set[int] = set()
        self.ended = False
        self._claims = Claims(self.size)

    def copies(self, incoming: Incoming) -> Copies:
        """Copies for ranges of the window, cut at its segments.

        Claims the ranges. Raises ValueError for one that leaves the window or overlaps another.
        """
        taken = self._claims.take(incoming)
        source, start = taken[:, 0].astype(np.int64), taken[:, 1].astype(np.int64)
        end = start + taken[:, 2].astype(np.int64)
        inside = self._starts[(self._starts > start[0]) & (self._starts < end[-1])]
        cuts = np.unique(np.concatenate([start, end, inside]))
        begin, stop = cuts[:-1], cuts[1:]
        row = np.searchsorted(start, begin, side="right") - 1
        covered = begin < end[row]
        begin, stop, row = begin[covered], stop[covered], row[covered]
        segment = np.searchsorted(self._starts, begin, side="right") - 1
        out = np.empty((len(begin), 3), dtype=np.uint64)
        out[:, 0] = self._addresses[segment] + begin - self._starts[segment]
        out[:, 1] = source[row] + begin - start[row]
        out[:, 2] = stop - begin
        return out
