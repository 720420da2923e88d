# SPDX-License-Identifier: Apache-2.0
"""The side that keeps: an arena in host memory behind the engine's questions and transfers.

A put is fetched from the asker over the very session of its question; a get is offered to the
asker, who fetches it. All state lives on the engine's control thread.
"""

from __future__ import annotations

import logging
import mmap
import secrets
from collections.abc import Callable
from concurrent.futures import Future

import msgspec
import numpy as np
import numpy.typing as npt

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import (
    CALL_TIMEOUT_S,
    EngineCore,
    ItemSource,
    MemoryTarget,
    OfferTerms,
    Question,
    Wanted,
    gathered_segments,
    index_runs,
)
from sage_kv_connector.store import messages as sm
from sage_kv_connector.store.arena import Arena
from sage_kv_connector.store.entries import Entries, Entry
from sage_kv_connector.telemetry.recording.flood import Flood, more_text

logger = logging.getLogger(__name__)

#: What was opened for a get and is not fetched stays unevictable this long, unless ``lease_s`` says otherwise.
LEASE_S = 10.0


class KVStore:
    """Life: construct → start → … → close (idempotent)."""

    def __init__(self, capacity: int, config: KVTransportConfig | None = None) -> None:
        """``capacity`` in bytes. Raises ValueError for bad options, OSError for memory that can't be had."""
        config = config or KVTransportConfig()
        if "lease_s" not in config.model_fields_set:
            config = config.model_copy(update={"lease_s": LEASE_S})
        self._arena = Arena(capacity)
        self._memory = _anonymous_memory(self._arena.capacity)
        self._base = int(self._memory.ctypes.data)
        self._entries = Entries(self._arena)
        self._counts = dict.fromkeys(
            ("put_entries", "put_bytes", "got_entries", "got_bytes", "hits", "misses", "refused"), 0
        )
        self._failed_transfers = 0
        self._flood = Flood()
        self._core = EngineCore(config)
        self._core.register_memory([(self._base, self._arena.capacity)])

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where clients reach it, once it is started."""
        return self._core.addresses

    def start(self) -> None:
        """Listen and serve. Raises OSError naming the address that can't be bound."""
        self._serve(sm.WHERE, sm.Empty, self._where)
        self._serve(sm.PUT, sm.Put, self._put)
        self._serve(sm.GET, sm.Get, self._get)
        self._serve(sm.HELD, sm.Held, self._held)
        self._serve(sm.CLEAR, sm.Clear, self._clear)
        self._serve(sm.STATS, sm.Empty, lambda question, _: question.answer(sm.encode(self._stats())))
        self._core.start()

    def close(self) -> None:
        self._core.close()

    def stats(self) -> sm.Stats:
        """From any thread while it runs. Raises TimeoutError."""
        found: Future[sm.Stats] = Future()
        self._core.update("", lambda: found.set_result(self._stats()))
        return found.result(CALL_TIMEOUT_S)

    def _serve(self, verb: str, kind: type[sm.Body], handler: Callable[[Question, sm.Body], None]) -> None:
        def handle(question: Question, payload: bytes) -> None:
            try:
                body = sm.decode(payload, kind)
            except sm.BodyError as error:
                question.refuse("bad_question", str(error))
                return
            handler(question, body)

        self._core.serve(verb, handle)

    def _where(self, question: Question, _: msgspec.Struct) -> None:
        question.answer(sm.encode(sm.Where(self._core.engine_id, node_id(), self._core.addresses)))

    def _held(self, question: Question, body: sm.Held) -> None:
        question.answer(sm.encode(sm.Flags(tuple(self._entries.holds(key) for key in body.keys))))

    def _clear(self, question: Question, body: sm.Clear) -> None:
        question.answer(sm.encode(sm.Cleared(self._entries.clear(body.prefix))))

    def _put(self, question: Question, body: sm.Put) -> None:
        batch = _PutBatch(question, len(body.keys))
        fresh: dict[int, Entry] = {}
        for index, (key, size) in enumerate(zip(body.keys, body.sizes, strict=True)):
            entry = self._entries.find(key)
            if entry is None:
                reserved = self._entries.reserve(key, size)
                if reserved is None:
                    self._counts["refused"] += 1
                    batch.settle(index, False)
                else:
                    fresh[index] = reserved
                    reserved.waiting.append(batch.settler(index))
            elif entry.nbytes != size:
                self._counts["refused"] += 1
                batch.settle(index, False)
            elif entry.landing:
                entry.waiting.append(batch.settler(index))
            else:
                batch.settle(index, True)
        if not fresh:
            return
        wanted = Wanted(
            transfer_id=body.transfer_id,
            target=MemoryTarget(
                gathered_segments([self._segments(entry) for entry in fresh.values()], range(len(fresh))),
                index_runs(sorted(fresh)),
            ),
            finished=True,
            deadline_s=min(body.timeout_ms / 1000, self._core.config.deadline_s),
        )
        self._core.subscribe(question.session, wanted, lambda outcome: self._landed(fresh, outcome))

    def _landed(self, fresh: dict[int, Entry], outcome: Outcome) -> None:
        if not outcome.ok:
            self._failed_transfers += 1
            assert outcome.failure is not None
            if (untold := self._flood.untold(outcome.failure.code)) is not None:
                why, more = outcome.error, more_text(untold)
                logger.warning("%d entries were not kept: %s%s", len(fresh), why, more)
        for entry in fresh.values():
            if outcome.ok:
                self._counts["put_entries"] += 1
                self._counts["put_bytes"] += entry.nbytes
                self._entries.commit(entry)
            else:
                self._entries.abandon(entry)

    def _get(self, question: Question, body: sm.Get) -> None:
        opened = [self._entries.open(key, size) for key, size in zip(body.keys, body.sizes, strict=True)]
        found = [entry for entry in opened if entry is not None]
        self._counts["hits"] += len(found)
        self._counts["misses"] += len(opened) - len(found)
        transfer_id = f"store-{secrets.token_hex(16)}" if found else ""
        peer = question.session.peer
        if found and peer is not None:
            source = ItemSource([self._segments(entry) for entry in found])

            def released(outcome: Outcome) -> None:
                if outcome.ok:
                    self._counts["got_entries"] += len(found)
                    self._counts["got_bytes"] += sum(entry.nbytes for entry in found)
                else:
                    self._failed_transfers += 1
                for entry in found:
                    self._entries.close(entry)

            self._core.offer(
                transfer_id, source, released, OfferTerms(only_for=peer.engine_id, finished=True)
            )
        question.answer(sm.encode(sm.Offered(transfer_id, tuple(entry is not None for entry in opened))))

    def _segments(self, entry: Entry) -> Segments:
        segments = np.array(entry.pieces(), dtype=np.uint64)
        segments[:, 0] += np.uint64(self._base)
        return segments

    def _stats(self) -> sm.Stats:
        return sm.Stats(
            capacity=self._arena.capacity,
            entries=len(self._entries),
            held_bytes=self._entries.nbytes,
            evicted=self._entries.evicted,
            evicted_bytes=self._entries.evicted_bytes,
            failed_transfers=self._failed_transfers,
            **self._counts,
        )


def _anonymous_memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Private to this process and taken only as it is written; in huge pages where the kernel has them,
    which halve what the kernel's own copies between processes cost. Raises OSError."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):
        pass  # built without them
    return np.frombuffer(memory, dtype=np.uint8)


class _PutBatch:
    """The answer to one put, given when each of its keys is settled."""

    def __init__(self, question: Question, keys: int) -> None:
        self._question = question
        self._flags: list[bool | None] = [None] * keys
        self._open = keys

    def settle(self, index: int, kept: bool) -> None:
        self._flags[index] = kept
        self._open -= 1
        if not self._open:
            self._question.answer(sm.encode(sm.Flags(tuple(bool(flag) for flag in self._flags))))

    def settler(self, index: int) -> Callable[[bool], None]:
        return lambda kept: self.settle(index, kept)
