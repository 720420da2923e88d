# SPDX-License-Identifier: Apache-2.0
"""The side that puts and gets, blocking: many keys at once, straight from and to registered memory.

Whatever the server does, a call returns within its deadline, and what did not work is a
miss: it is logged, and the server is left alone for a short while (``Backoff``). Any thread may call.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import msgspec
import numpy as np

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.config import LONGEST_S, KVTransportConfig
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import (
    CALL_TIMEOUT_S,
    EngineCore,
    ItemSource,
    MemoryTarget,
    Reply,
    Subscription,
    Wanted,
    capabilities_of,
    enabled_backends,
    gathered_segments,
    order_addresses,
    scheme_of,
)
from sage_kv_connector.store import messages as sm
from sage_kv_connector.store.backoff import Backoff

logger = logging.getLogger(__name__)

#: One question moves at most this many bytes, unless its only item has more.
BATCH_BYTES = 256 << 20

_T = TypeVar("_T")
_Move = Callable[[tuple[str, ...], Sequence[Segments], tuple[int, ...], float], list[bool]]


class StoreFailure(Exception):
    """The server did not do its part; only seen inside this module."""


class StoreClient:
    """Life: construct (connects at the first call) → … → close (idempotent).

    Only where this process's own control thread hangs does a call raise TimeoutError: what it would say
    about the memory is not known then.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        config: KVTransportConfig | None = None,
        *,
        deadline_s: float = 5.0,
        backoff: Backoff | None = None,
    ) -> None:
        """``addresses`` of one server, the best first; ``deadline_s`` bounds every call.

        Raises ValueError naming the option, value and what is allowed.
        """
        config = config or KVTransportConfig()
        enabled = enabled_backends(config)
        unusable = [a for a in addresses if scheme_of(a) not in enabled]
        if unusable or not addresses:
            raise ValueError(
                f"address is {list(addresses)}; at least one is needed, and each must begin with "
                + " or ".join(f"{name}://" for name in enabled)
            )
        if not 0 < deadline_s <= LONGEST_S:
            raise ValueError(f"deadline_s is {deadline_s}, must be more than 0 and at most {LONGEST_S}")
        self._enabled = enabled
        self._given = PeerAddress("", 0, tuple(addresses))
        self._deadline_s = deadline_s
        self._backoff = backoff or Backoff()
        self._lock = threading.Lock()
        self._peer: PeerAddress | None = None
        self._closed = False
        self._core = EngineCore(config)
        self._core.start(listen=False)

    def register_memory(self, extents: Iterable[tuple[int, int]]) -> None:
        """Items may lie in these (address, length) spans, which must stay valid until ``close``."""
        self._core.register_memory(extents)

    def put(self, keys: Sequence[str], items: Sequence[Segments]) -> list[bool]:
        """Keep the bytes of ``items[i]``, segments of shape (n, 2), as ``keys[i]``; returns which are kept now.

        The memory must not change meanwhile; it is free again when the call returns. Raises ValueError
        for keys and items that are not allowed, whatever the server does.
        """
        return self._in_batches(keys, items, self._put)

    def get(self, keys: Sequence[str], items: Sequence[Segments]) -> list[bool]:
        """Fetch ``keys[i]`` into ``items[i]``; returns which landed. The others' memory may hold anything.

        Raises ValueError as ``put`` does.
        """
        return self._in_batches(keys, items, self._get)

    def held(self, keys: Sequence[str]) -> list[bool]:
        """Which keys the server has now. Raises ValueError for keys that are not allowed."""
        until = time.monotonic() + self._deadline_s
        flags: list[bool] = []
        for first in range(0, len(keys), sm.MAX_KEYS):
            some = tuple(keys[first : first + sm.MAX_KEYS])
            sm.check_keys(some)
            answer = self._guarded(partial(self._flags, sm.HELD, sm.Held(some), len(some), until))
            flags += answer or [False] * len(some)
        return flags

    def clear(self, prefix: str = "") -> bool:
        """Remove all keys that begin so; whether that worked. Raises ValueError for a prefix that no key can have."""
        if len(prefix) > sm.MAX_KEY:
            raise ValueError(f"prefix has {len(prefix)} characters, at most {sm.MAX_KEY} are allowed")
        until = time.monotonic() + self._deadline_s
        return self._guarded(lambda: self._ask(sm.CLEAR, sm.Clear(prefix), sm.Cleared, until)) is not None

    def stats(self) -> sm.Stats | None:
        """The server's counters; None if it does not answer."""
        until = time.monotonic() + self._deadline_s
        return self._guarded(lambda: self._ask(sm.STATS, sm.Empty(), sm.Stats, until))

    def close(self) -> None:
        """End what is under way, as misses; so are all calls from now on."""
        self._closed = True
        self._core.close()

    def _in_batches(self, keys: Sequence[str], items: Sequence[Segments], move: _Move) -> list[bool]:
        if len(keys) != len(items):
            raise ValueError(f"items has {len(items)} entries, keys has {len(keys)}")
        sizes = _sizes(items)
        if not all(0 < size <= sm.MAX_ITEM_BYTES for size in sizes):
            raise ValueError(f"an item has no bytes, or more than {sm.MAX_ITEM_BYTES}")
        until = time.monotonic() + self._deadline_s
        flags: list[bool] = []
        for part in _batches(sizes):
            some = tuple(keys[part])
            sm.check_keys(some)
            done = self._guarded(partial(move, some, items[part], tuple(sizes[part]), until))
            flags += done or [False] * len(some)
        return flags

    def _put(
        self, keys: tuple[str, ...], items: Sequence[Segments], sizes: tuple[int, ...], until: float
    ) -> list[bool]:
        transfer_id = f"put-{secrets.token_hex(16)}"
        self._core.offer(transfer_id, ItemSource(items), lambda outcome: None)
        try:
            body = sm.Put(transfer_id, keys, sizes, _milliseconds(until))
            return self._flags(sm.PUT, body, len(keys), until)
        finally:
            self._core.withdraw([transfer_id], "the put is over")

    def _get(
        self, keys: tuple[str, ...], items: Sequence[Segments], sizes: tuple[int, ...], until: float
    ) -> list[bool]:
        peer = self._server(until)
        offered = self._ask(sm.GET, sm.Get(keys, sizes), sm.Offered, until)
        if len(offered.flags) != len(keys):
            raise StoreFailure(f"it answered {len(offered.flags)} flags for {len(keys)} keys")
        found = np.flatnonzero(offered.flags)
        if not len(found):
            return [False] * len(keys)
        target = MemoryTarget(gathered_segments(items, found))
        wanted = Wanted(offered.transfer_id, target, True, _seconds(until))
        done: Future[Outcome] = Future()
        started: list[Subscription] = []
        self._core.subscribe(peer, wanted, done.set_result, started.append)
        try:
            outcome = done.result(_seconds(until) + CALL_TIMEOUT_S)
        except TimeoutError:
            self._core.cancel_all(started)
            raise StoreFailure("the transfer did not end in time") from None
        if not outcome.ok:
            raise StoreFailure(outcome.error)
        return list(offered.flags)

    def _flags(self, verb: str, body: msgspec.Struct, keys: int, until: float) -> list[bool]:
        flags = self._ask(verb, body, sm.Flags, until).flags
        if len(flags) != keys:
            raise StoreFailure(f"it answered {len(flags)} flags for {keys} keys")
        return list(flags)

    def _ask(self, verb: str, body: msgspec.Struct, kind: type[sm.Body], until: float) -> sm.Body:
        return self._ask_peer(self._server(until), verb, body, kind, until)

    def _ask_peer(
        self, peer: PeerAddress, verb: str, body: msgspec.Struct, kind: type[sm.Body], until: float
    ) -> sm.Body:
        answered: Future[Reply] = Future()
        self._core.ask(peer, verb, sm.encode(body), answered.set_result, _seconds(until))
        try:
            reply = answered.result(_seconds(until) + CALL_TIMEOUT_S)
        except TimeoutError:
            raise StoreFailure("the control thread does not answer") from None
        if not reply.ok:
            raise StoreFailure(f"{verb}: {reply.detail} ({reply.code})")
        try:
            return sm.decode(reply.body, kind)
        except sm.BodyError as error:
            raise StoreFailure(f"{verb}: its answer is no answer: {error}") from error

    def _server(self, until: float) -> PeerAddress:
        """Where to ask: on the server's own node its shared memory, else what was given."""
        with self._lock:
            if self._peer is None:
                where = self._ask_peer(self._given, sm.WHERE, sm.Empty(), sm.Where, until)
                usable = order_addresses(where.addresses, where.node, self._enabled)
                near = tuple(
                    a
                    for a in usable
                    if not capabilities_of(a).crosses_nodes and a not in self._given.addresses
                )
                # Where nothing is nearer, the session that answered serves for all.
                self._peer = (
                    PeerAddress(where.engine_id, 0, near + self._given.addresses) if near else self._given
                )
            return self._peer

    def _guarded(self, call: Callable[[], _T]) -> _T | None:
        """None for what did not work; nothing is tried during a pause, nor after ``close``."""
        if self._closed or self._backoff.pausing:
            return None
        try:
            result = call()
        except StoreFailure as error:
            pause = self._backoff.failed()
            with self._lock:
                self._peer = None
            logger.warning(
                "store %s: %s; it is left alone for %.1f s", ", ".join(self._given.addresses), error, pause
            )
            return None
        self._backoff.worked()
        return result


def _sizes(items: Sequence[Segments]) -> list[int]:
    """Bytes of each item; 0 for one without segments."""
    counts = [len(segments) for segments in items]
    if not all(counts):
        return [0] * len(items)
    starts = np.cumsum([0, *counts[:-1]])
    sizes: list[int] = np.add.reduceat(np.concatenate(items)[:, 1], starts).tolist() if items else []
    return sizes


def _batches(sizes: Sequence[int]) -> Iterator[slice]:
    """Cuts that keep a question's keys and bytes within bounds; each has at least one item."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and (total + size > BATCH_BYTES or index - first >= sm.MAX_KEYS):
            yield slice(first, index)
            first, total = index, 0
        total += size
    if first < len(sizes):
        yield slice(first, len(sizes))


def _seconds(until: float) -> float:
    return max(0.0, until - time.monotonic())


def _milliseconds(until: float) -> int:
    return max(1, int(_seconds(until) * 1000))
