# SPDX-License-Identifier: Apache-2.0
"""What a store keeps, against a model of it: a dict of bytes, an order of use, and who is in use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sage_kv_connector.store.arena import GRAIN, Arena
from sage_kv_connector.store.entries import Entries, Entry

GRAINS = 5
keys = st.sampled_from(["a", "b", "c", "ax", "d"])
sizes = st.integers(1, 3 * GRAIN)


class EntriesMachine(RuleBasedStateMachine):
    """Entries write real bytes to a real arena; the model says what must be read back."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = Entries(Arena(GRAINS * GRAIN))
        self.memory = bytearray(GRAINS * GRAIN)
        self.whole: dict[str, bytes] = {}  # in order of use, the oldest first
        self.landing: dict[str, tuple[Entry, bytes]] = {}
        self.doomed: list[tuple[Entry, bytes]] = []  # cleared while landing
        self.reading: list[tuple[Entry, bytes]] = []
        self.stamp = 0

    def use(self, key: str) -> None:
        if key in self.whole:
            self.whole[key] = self.whole.pop(key)

    def write(self, entry: Entry, content: bytes) -> None:
        done = 0
        for offset, length in entry.pieces():
            self.memory[offset : offset + length] = content[done : done + length]
            done += length
        assert done == len(content)

    def read(self, entry: Entry) -> bytes:
        return b"".join(bytes(self.memory[offset : offset + length]) for offset, length in entry.pieces())

    def in_use(self) -> int:
        """Grains that can't be evicted."""
        pinned = {id(entry): entry for entry, _ in self.reading}
        landing = [entry for entry, _ in [*self.landing.values(), *self.doomed]]
        return sum(Arena.rounded(entry.nbytes) for entry in [*pinned.values(), *landing]) // GRAIN

    @rule(key=keys, size=sizes)
    def reserve(self, key: str, size: int) -> None:
        if key in self.whole or key in self.landing:
            with pytest.raises(ValueError, match="is there already"):
                self.entries.reserve(key, size)
            return
        needed = Arena.rounded(size) // GRAIN
        entry = self.entries.reserve(key, size)
        assert (entry is not None) == (needed <= GRAINS - self.in_use()), "room is made if it can be"
        if entry is not None:
            self.stamp += 1
            content = bytes([self.stamp % 256]) * size
            self.write(entry, content)
            self.landing[key] = (entry, content)
            self.follow_evictions()

    @rule(key=keys, size=sizes)
    def put(self, key: str, size: int) -> None:
        """Reserved and landed at once, so that there is much to evict."""
        if key not in self.whole and key not in self.landing:
            self.reserve(key, size)
            if key in self.landing:
                self.end(key, lands=True)

    def follow_evictions(self) -> None:
        """Take from the model what was evicted: nothing in use, and nothing younger than what stayed."""
        opened = {id(entry) for entry, _ in self.reading}
        gone = [key for key in self.whole if key not in self.entries._by_key]
        stayed = [
            key
            for key in self.whole
            if key in self.entries._by_key and id(self.entries._by_key[key]) not in opened
        ]
        order = list(self.whole)
        assert not gone or not stayed or order.index(gone[-1]) < order.index(stayed[0]), "the oldest go first"
        for key in gone:
            del self.whole[key]

    @precondition(lambda self: self.landing)
    @rule(data=st.data(), lands=st.booleans())
    def settle(self, data: st.DataObject, lands: bool) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.landing))), lands)

    def end(self, key: str, lands: bool) -> None:
        entry, content = self.landing.pop(key)
        if not lands:
            self.entries.abandon(entry)
            return
        order = list(self.entries._by_key)
        self.entries.commit(entry)
        self.whole[key] = content
        for other in order[
            order.index(key) + 1 :
        ]:  # its place is that of its reservation, or of a later look
            self.use(other)

    @precondition(lambda self: self.doomed)
    @rule(lands=st.booleans())
    def settle_cleared(self, lands: bool) -> None:
        entry, _ = self.doomed.pop()
        (self.entries.commit if lands else self.entries.abandon)(entry)

    @rule(key=keys)
    def look(self, key: str) -> None:
        assert self.entries.holds(key) == (key in self.whole)
        self.use(key)

    @rule(key=keys)
    def open_absent(self, key: str) -> None:
        """Not there, not there yet, or there with another size."""
        if key in self.landing:
            assert self.entries.open(key, len(self.landing[key][1])) is None
        else:
            assert self.entries.open(key, len(self.whole.get(key, b"")) + 1) is None
        self.use(key)

    @precondition(lambda self: self.whole)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.whole)))
        entry = self.entries.open(key, len(self.whole[key]))
        assert entry is not None
        self.use(key)
        self.reading.append((entry, self.whole[key]))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        entry, content = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        assert self.read(entry) == content, "what is read stays as it was"
        self.entries.close(entry)

    @rule(prefix=st.sampled_from(["a", "b", "zz"]))
    def clear(self, prefix: str) -> None:
        cleared = [key for key in [*self.whole, *self.landing] if key.startswith(prefix)]
        assert self.entries.clear(prefix) == len(cleared)
        for key in cleared:
            self.whole.pop(key, None)
            if key in self.landing:
                self.doomed.append(self.landing.pop(key))

    @invariant()
    def what_is_kept_is_whole(self) -> None:
        assert len(self.entries) == len(self.whole) + len(self.landing)
        for key, content in self.whole.items():
            assert self.read(self.entries._by_key[key]) == content
        for entry, content in [*self.landing.values(), *self.doomed, *self.reading]:
            assert self.read(entry) == content, "no other entry was put where this one lies"

    def teardown(self) -> None:
        for entry, _ in self.reading:
            self.entries.close(entry)
        for entry, _ in [*self.landing.values(), *self.doomed]:
            self.entries.abandon(entry)
        self.entries.clear("")
        assert self.entries.reserve("all", GRAINS * GRAIN) is not None, "no byte was lost"


TestEntries = EntriesMachine.TestCase
TestEntries.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_who_waits_is_told_how_it_ended() -> None:
    entries = Entries(Arena(4 * GRAIN))
    told: list[tuple[str, bool]] = []
    for key, end in (("kept", entries.commit), ("lost", entries.abandon)):
        entry = entries.reserve(key, 100)
        assert entry is not None
        entry.waiting.append(lambda landed, key=key: told.append((key, landed)))  # type: ignore[misc]
        end(entry)
    assert told == [("kept", True), ("lost", False)]
    assert entries.holds("kept") and not entries.holds("lost")


def test_nothing_is_evicted_for_what_will_not_fit() -> None:
    entries = Entries(Arena(4 * GRAIN))
    for key in ("a", "b"):
        entry = entries.reserve(key, GRAIN)
        assert entry is not None
        entries.commit(entry)
    assert entries.reserve("huge", 5 * GRAIN) is None
    assert entries.holds("a") and entries.holds("b") and entries.evicted == 0
