# SPDX-License-Identifier: Apache-2.0
"""What a store keeps: key → bytes in its arena, the least recently used thrown out first.

Life of an entry: ``reserve`` (nobody sees its bytes) → ``commit`` | ``abandon``; ``open`` and
``close`` around each reading. Only a committed entry that nobody reads is ever evicted. No I/O
and no lock: one thread owns it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from sage_kv_connector.store.arena import Arena, Extent


class Entry:
    """One key's bytes. ``landing``: they are being written."""

    __slots__ = ("extents", "key", "landing", "nbytes", "readers", "removed", "waiting")

    def __init__(self, key: str, nbytes: int, extents: tuple[Extent, ...]) -> None:
        self.key = key
        self.nbytes = nbytes
        self.extents = extents
        self.landing = True
        self.removed = False  #: nobody finds it any more; its bytes are free when nobody uses them
        self.readers = 0
        self.waiting: list[Callable[[bool], None]] = []  #: told whether it landed

    def pieces(self) -> list[Extent]:
        """Its extents, cut to exactly ``nbytes``."""
        out, left = [], self.nbytes
        for offset, length in self.extents:
            out.append((offset, min(length, left)))
            left -= min(length, left)
        return out


class Entries:
    """All entries of one store, by recency of use."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._by_key: OrderedDict[str, Entry] = OrderedDict()
        self._evictable = 0  #: bytes of the arena that eviction could free
        self.evicted = 0
        self.evicted_bytes = 0

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, those that are landing included."""
        return sum(entry.nbytes for entry in self._by_key.values())

    def find(self, key: str) -> Entry | None:
        """The entry, landing or whole; counts as a use."""
        entry = self._by_key.get(key)
        if entry is not None:
            self._by_key.move_to_end(key)
        return entry

    def holds(self, key: str) -> bool:
        """Whether ``open`` would find it; counts as a use."""
        entry = self.find(key)
        return entry is not None and not entry.landing

    def reserve(self, key: str, nbytes: int) -> Entry | None:
        """Room for a new key's bytes, with others evicted for it; None if not even that makes enough.

        Raises ValueError for a key that is there, and for ``nbytes`` below 1.
        """
        if key in self._by_key or nbytes < 1:
            raise ValueError(f"key {key!r} is there already, or {nbytes} bytes are none")
        needed = self._arena.rounded(nbytes)
        if needed > self._arena.free_bytes + self._evictable:
            return None
        self._evict(needed)
        extents = self._arena.allocate(nbytes)
        assert extents is not None
        entry = self._by_key[key] = Entry(key, nbytes, extents)
        return entry

    def commit(self, entry: Entry) -> None:
        """All of its bytes are there: from now on it is found, unless it was removed meanwhile."""
        entry.landing = False
        if entry.removed:
            self._arena.free(entry.extents)
        else:
            self._evictable += self._arena.rounded(entry.nbytes)
        self._tell(entry, not entry.removed)

    def abandon(self, entry: Entry) -> None:
        """Its bytes won't come, and nothing writes there any more."""
        if not entry.removed:
            del self._by_key[entry.key]
        self._arena.free(entry.extents)
        self._tell(entry, False)

    def open(self, key: str, nbytes: int) -> Entry | None:
        """Begin to read a whole entry of exactly ``nbytes``; None if there is none."""
        entry = self.find(key)
        if entry is None or entry.landing or entry.nbytes != nbytes:
            return None
        if not entry.readers:
            self._evictable -= self._arena.rounded(entry.nbytes)
        entry.readers += 1
        return entry

    def close(self, entry: Entry) -> None:
        """End one reading."""
        entry.readers -= 1
        if entry.readers:
            return
        if entry.removed:
            self._arena.free(entry.extents)
        else:
            self._evictable += self._arena.rounded(entry.nbytes)

    def clear(self, prefix: str) -> int:
        """Remove what begins with ``prefix``; returns how many. What is in use stays where it is until it is not."""
        found = [entry for key, entry in self._by_key.items() if key.startswith(prefix)]
        for entry in found:
            self._remove(entry)
        return len(found)

    def _evict(self, needed: int) -> None:
        if needed <= self._arena.free_bytes:
            return
        victims, freed = [], self._arena.free_bytes
        for entry in self._by_key.values():
            if freed >= needed:
                break
            if not entry.landing and not entry.readers:
                victims.append(entry)
                freed += self._arena.rounded(entry.nbytes)
        for entry in victims:
            self._remove(entry)
            self.evicted += 1
            self.evicted_bytes += entry.nbytes

    def _remove(self, entry: Entry) -> None:
        del self._by_key[entry.key]
        entry.removed = True
        if not entry.landing and not entry.readers:
            self._evictable -= self._arena.rounded(entry.nbytes)
            self._arena.free(entry.extents)

    @staticmethod
    def _tell(entry: Entry, landed: bool) -> None:
        waiting, entry.waiting = entry.waiting, []
        for report in waiting:
            report(landed)
