# SPDX-License-Identifier: Apache-2.0
"""Which bytes of one span of memory are free. An allocation may come in several extents, so it never
fails for fragmentation."""

from __future__ import annotations

from bisect import bisect_left

#: Allocations are whole multiples of this many bytes.
GRAIN = 4096

#: (offset, length) in bytes.
Extent = tuple[int, int]


class Arena:
    """Free extents of ``[0, capacity)``; ``capacity`` is rounded down to whole grains."""

    def __init__(self, capacity: int) -> None:
        """Raises ValueError for a capacity below one grain."""
        if capacity < GRAIN:
            raise ValueError(f"capacity is {capacity} bytes, at least {GRAIN} are needed")
        self.capacity = capacity // GRAIN * GRAIN
        self.free_bytes = self.capacity
        self._offsets = [0]
        self._lengths = {0: self.capacity}

    @staticmethod
    def rounded(nbytes: int) -> int:
        """The bytes that an allocation of ``nbytes`` takes."""
        return -(-nbytes // GRAIN) * GRAIN

    def allocate(self, nbytes: int) -> tuple[Extent, ...] | None:
        """Extents of ``rounded(nbytes)`` bytes together; None if fewer are free."""
        needed = self.rounded(nbytes)
        if needed > self.free_bytes:
            return None
        self.free_bytes -= needed
        extents: list[Extent] = []
        while needed:
            offset = self._offsets[-1]
            length = self._lengths[offset]
            taken = min(length, needed)
            if taken == length:
                self._offsets.pop()
                del self._lengths[offset]
                extents.append((offset, taken))
            else:
                self._lengths[offset] = length - taken
                extents.append((offset + length - taken, taken))
            needed -= taken
        return tuple(extents)

    def free(self, extents: tuple[Extent, ...]) -> None:
        """Give an allocation back, whole; neighbours grow together."""
        for offset, length in extents:
            self.free_bytes += length
            at = bisect_left(self._offsets, offset)
            following = self._offsets[at] if at < len(self._offsets) else None
            if following == offset + length:
                length += self._lengths.pop(offset + length)
                del self._offsets[at]
            before = self._offsets[at - 1] if at else None
            if before is not None and before + self._lengths[before] == offset:
                self._lengths[before] += length
            else:
                self._offsets.insert(at, offset)
                self._lengths[offset] = length
