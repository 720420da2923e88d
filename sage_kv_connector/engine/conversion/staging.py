# SPDX-License-Identifier: Apache-2.0
"""A bounded arena of host memory that converted bytes wait in, and who waits for room in it.

Memory: one anonymous mapping, touched only as far as it is used, registered once with every
backend. A lease is a run of it; the lowest free run that is long enough is taken. Requests
are served in order, so a large one is not starved by small ones. No peer has all of it: one that
takes nothing off its ring does not stop the others. Control thread only.
"""

from __future__ import annotations

import mmap
from collections import Counter, deque
from collections.abc import Callable, Hashable

import numpy as np

from sage_kv_connector.backends.converting_backend import Ring

ALIGNMENT = 4096
#: Slots that a transfer's parts take turns in; of one whose prefill still computes, which is no faster with more.
RING_SLOTS, STREAMING_SLOTS = 8, 4
#: The share of an arena that a ring may have.
RINGS_IN_ARENA = 4
SMALLEST_PART_BYTES, LARGEST_PART_BYTES = 256 << 10, 4 << 20


class Lease:
    """Memory ``[address, address + nbytes)``; 0 while it waits for room."""

    __slots__ = ("address", "nbytes", "on_ready", "owner", "released")

    def __init__(self, nbytes: int, on_ready: Callable[[Lease], None], owner: Hashable) -> None:
        self.address = 0
        self.nbytes = nbytes
        self.on_ready = on_ready
        self.owner = owner
        self.released = False


class StagingArena:
    """``capacity`` bytes; ``register`` is called once with (address, length) before the first lease.

    ``allocate``: gives page-aligned memory of that many bytes, for as long as the arena is used;
    an anonymous mapping by default.
    """

    def __init__(
        self,
        capacity: int,
        register: Callable[[int, int], None],
        allocate: Callable[[int], int] | None = None,
    ) -> None:
        self.capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        self._register = register
        self._memory: mmap.mmap | None = None
        self._allocate = allocate or self._map
        self._base = 0
        self._free: list[tuple[int, int]] = [(0, self.capacity)]
        self._waiting: deque[Lease] = deque()
        self._used: Counter[Hashable] = Counter()  #: bytes, by owner

    @property
    def in_use(self) -> int:
        return self.capacity - sum(length for _, length in self._free)

    def request(self, nbytes: int, on_ready: Callable[[Lease], None], owner: Hashable = None) -> Lease:
        """``on_ready(lease)`` comes at once or when room is there. ``owner``: whom it is for.

        Raises ValueError for more than all of it, and what ``allocate`` raises.
        """
        if not 0 < nbytes <= self.capacity:
            raise ValueError(
                f"nbytes is {nbytes}, the staging arena has {self.capacity} (option staging_bytes)"
            )
        if not self._base:
            self._base = self._allocate(self.capacity)
            self._register(self._base, self.capacity)
        lease = Lease(nbytes, on_ready, owner)
        self._waiting.append(lease)
        self._serve()
        return lease

    def release(self, lease: Lease) -> None:
        """Give back a lease, or stop waiting for it. Idempotent."""
        if lease.released:
            return
        lease.released = True
        if not lease.address:
            self._serve()  # it may have stood in the way of smaller ones
            return
        self._count(lease, -1)
        self._free.append((lease.address - self._base, _rounded(lease.nbytes)))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged
        self._serve()

    def _serve(self) -> None:
        while (lease := self._next()) is not None and self._take(lease):
            self._waiting.remove(lease)
            self._count(lease, 1)
            lease.on_ready(lease)

    def _next(self) -> Lease | None:
        """The first one whose owner leaves the others their share, or has nothing yet."""
        while self._waiting and self._waiting[0].released:
            self._waiting.popleft()
        most = self.capacity - self.capacity // RINGS_IN_ARENA
        for lease in self._waiting:
            used = self._used[lease.owner]
            shares = lease.owner is None or not used or used + _rounded(lease.nbytes) <= most
            if shares and not lease.released:
                return lease
        return None

    def _count(self, lease: Lease, sign: int) -> None:
        self._used[lease.owner] += sign * _rounded(lease.nbytes)
        if not self._used[lease.owner]:
            del self._used[lease.owner]

    def _take(self, lease: Lease) -> bool:
        wanted = _rounded(lease.nbytes)
        for index, (start, length) in enumerate(self._free):
            if length >= wanted:
                if length == wanted:
                    del self._free[index]
                else:
                    self._free[index] = (start + wanted, length - wanted)
                lease.address = self._base + start
                return True
        return False

    def _map(self, nbytes: int) -> int:
        self._memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return int(np.frombuffer(self._memory, np.uint8).ctypes.data)


def part_bytes_of(arena: StagingArena) -> int:
    """Bytes of a part, so that several transfers have a ring at a time."""
    part = arena.capacity // RINGS_IN_ARENA // RING_SLOTS
    return min(max(part, SMALLEST_PART_BYTES), LARGEST_PART_BYTES)


def ring_of(arena: StagingArena, part_bytes: int, parts: int, *, finished: bool) -> Ring:
    """The shape of a ring for ``parts`` parts of at most ``part_bytes``; a few large ones where they are larger.

    ``finished``: prefill is over, so that all of it moves at once.
    """
    slot = _rounded(part_bytes)
    most = RING_SLOTS if finished else STREAMING_SLOTS
    slots = max(1, min(most, parts, arena.capacity // RINGS_IN_ARENA // slot))
    return Ring(0, slot, slots)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
