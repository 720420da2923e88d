# SPDX-License-Identifier: Apache-2.0
"""Blocking messages between two ranks, on the same EngineCore as the connectors.

Message ``n`` from one rank to another is three transfers. The sender offers its size
(``…/size``) and its bytes (``…/data``); the receiver fetches the size only if it does not know it,
then the bytes, and offers its verdict (``…/verdict``), for which the sender waits. So ``send``
returns when the bytes are in the other rank's memory and hold, and both sides agree about which
message comes next: a number is used up by success alone, a failed message may be tried again.

Whatever happens, a call ends within ``deadline_s``, and at once when the peer's process ends.
Methods may be called from any thread; messages of one pair and tag are paired in the order of calls.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import Any

import numpy as np

from sage_kv_connector.backends.base import Segments
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.chunk import DeviceSpec
from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import (
    EngineCore,
    MemorySource,
    MemoryTarget,
    OfferTerms,
    Subscription,
    Wanted,
    order_addresses,
)
from sage_kv_connector.integrations.sage.payload import HostMemory, Tagged, to_receive, to_send
from sage_kv_connector.integrations.sage.turns import Turn, Turns
from sage_kv_connector.integrations.sage.verdict import VERDICT_BYTES, Verdict, refusal_in

#: The size of a message: u64 bytes.
_SIZE = struct.Struct("<Q")
#: Offers end when their message ends, not when somebody was served: a receiver may try again.
_CONSUMERS = 1 << 20
#: The control thread settles a call a little after its deadline; this is for the case that it does not.
_GRACE_S = 10.0
#: A sender waits for its verdict already when it is offered; one that does not fetch it is gone.
_LINGER_S = 10.0


AtEnd = Callable[[Outcome], None]


def _unmatched(outcome: Outcome) -> bool:
    """Whether the offer never came."""
    return outcome.failure is not None and outcome.failure.code is Code.UNKNOWN_TRANSFER


class MessageError(RuntimeError):
    """A message did not arrive, or not as it was sent; the text names ranks, message and reason."""


class PointToPoint:
    """Messages of one rank. ``join`` tells it where the others are."""

    def __init__(self, config: KVTransportConfig, rank: int) -> None:
        self.rank = rank
        self._config = config
        self._core = EngineCore(config)
        self._core.start()
        self._peers: dict[int, PeerAddress] = {}
        self._turns = Turns()
        self._verdicts: dict[str, Verdict] = {}  # on offer
        self._closed = False

    @property
    def spec(self) -> DeviceSpec:
        """What the other ranks need to know to reach this one."""
        return DeviceSpec(addresses=self._core.addresses, engine_id=self._core.engine_id, node=node_id())

    def join(self, table: dict[int, DeviceSpec]) -> None:
        """Where every rank is. Raises ValueError for a peer that no enabled backend reaches."""
        enabled = tuple(self._core.backends)
        for rank, spec in table.items():
            addresses = order_addresses(spec.addresses, spec.node, enabled)
            if rank != self.rank and not addresses:
                raise ValueError(
                    f"rank {rank} listens on {', '.join(spec.addresses) or 'nothing'}; "
                    f"none of it can be reached with backend {', '.join(enabled)} from here"
                )
            self._peers[rank] = PeerAddress(spec.engine_id, 0, addresses)

    def counters(self) -> dict[str, int]:
        return self._core.counters()

    def close(self) -> None:
        """Calls under way end with an error; who sent what arrived here still learns so. Idempotent."""
        until = time.monotonic() + (0 if self._closed else _LINGER_S)
        while self._verdict_unread() and self._core.counters()["sessions"] and time.monotonic() < until:
            time.sleep(0.001)
        self._closed = True
        self._core.close()

    def send(self, payload: Any, to: int, *, deadline_s: float | None = None) -> int:
        """Hand the payload's bytes to ``recv`` of rank ``to``; returns how many, once they are there and hold.

        Raises MessageError, and ValueError for a payload or a rank that is not taken.
        """
        peer, (content, tag) = self._peer(to), _untagged(payload)
        memory = to_send(content)
        with self._turns.take("send", to, tag) as turn:
            name = self._name(self._core.engine_id, peer.engine_id, tag, turn.number)
            what = f"send of message {turn.number}{_shown(tag)} from rank {self.rank} to rank {to}"
            self._exchange(name, what, memory, peer, deadline_s or self._config.deadline_s)
            turn.number += 1
        return memory.nbytes

    def recv(self, payload: Any, source: int, *, deadline_s: float | None = None) -> int:
        """Fill ``payload`` with what rank ``source`` sends; returns the bytes. An empty bytearray grows to fit.

        Raises MessageError (the payload may then hold some of the bytes), and ValueError for a payload
        or a rank that is not taken.
        """
        peer, (content, tag) = self._peer(source), _untagged(payload)
        deadline = deadline_s or self._config.deadline_s
        with self._turns.take("recv", source, tag) as turn:
            name = self._name(peer.engine_id, self._core.engine_id, tag, turn.number)
            what = f"recv of message {turn.number}{_shown(tag)} at rank {self.rank} from rank {source}"
            turn.try_again(self._core, f"{name}/verdict")
            if isinstance(content, bytearray) and not content:
                content += bytes(self._ask_size(name, what, peer, deadline))
            memory = to_receive(content)
            if memory.nbytes:
                until = time.monotonic() + deadline

                def arrived(outcome: Outcome) -> None:
                    # Who only came too early or waited too short tries again; the sender goes on waiting.
                    if outcome.ok or not (_unmatched(outcome) or time.monotonic() >= until):
                        self._tell(turn, name, tag, peer, outcome.error)

                outcome = self._fetch(f"{name}/data", memory, peer, deadline, arrived)
                if not outcome.ok:
                    raise MessageError(f"{what}: {outcome.error}")
            else:
                self._receive_nothing(turn, name, tag, what, peer, deadline)
            memory.finish()
            turn.number += 1
        return memory.nbytes

    # -- the sender's half

    def _exchange(self, name: str, what: str, memory: HostMemory, peer: PeerAddress, deadline: float) -> None:
        size = np.frombuffer(_SIZE.pack(memory.nbytes), dtype=np.uint8).copy()
        verdict = np.zeros(VERDICT_BYTES, dtype=np.uint8)
        with self._registered(memory.segments, _array(size), _array(verdict)):
            released: list[Future[Outcome]] = []
            names = [f"{name}/size", *([f"{name}/data"] if memory.nbytes else [])]
            for offered, segments in zip(names, (_array(size), memory.segments), strict=False):
                done: Future[Outcome] = Future()
                self._offer(offered, MemorySource(segments), done.set_result, peer)
                released.append(done)

            def end_offers(_: Outcome | None = None) -> None:
                self._core.withdraw(names, "the sender's call ended")

            try:
                outcome = self._subscribe(f"{name}/verdict", _array(verdict), peer, deadline, end_offers)
            except BaseException:
                end_offers()
                raise
            if not outcome.ok:
                # What became of the bytes says more than that no verdict came, if it is known.
                data = released[-1].result() if memory.nbytes and released[-1].done() else None
                more = f" ({data.error})" if data is not None and data.error else ""
                raise MessageError(f"{what}: no verdict: {outcome.error}{more}")
        if refused := refusal_in(verdict):
            raise MessageError(f"{what}: the receiver failed: {refused}")

    # -- the receiver's half

    def _ask_size(self, name: str, what: str, peer: PeerAddress, deadline: float) -> int:
        size = np.zeros(_SIZE.size, dtype=np.uint8)
        outcome = self._fetch(f"{name}/size", HostMemory(size.ctypes.data, size.nbytes, size), peer, deadline)
        if not outcome.ok:
            raise MessageError(f"{what}: {outcome.error}")
        return int(_SIZE.unpack(size.data)[0])

    def _receive_nothing(
        self, turn: Turn, name: str, tag: str, what: str, peer: PeerAddress, deadline: float
    ) -> None:
        """An empty message has no bytes to fetch: only its size says that it is there."""
        size = self._ask_size(name, what, peer, deadline)
        error = f"nbytes: {size} offered, 0 asked for" if size else ""
        self._tell(turn, name, tag, peer, error)
        if error:
            raise MessageError(f"{what}: {error}")

    def _fetch(
        self, name: str, memory: HostMemory, peer: PeerAddress, deadline: float, at_end: AtEnd | None = None
    ) -> Outcome:
        with self._registered(memory.segments):
            return self._subscribe(name, memory.segments, peer, deadline, at_end)

    def _tell(self, turn: Turn, name: str, tag: str, peer: PeerAddress, error: str) -> None:
        """Offer the verdict; it stays for a lease, so that a sender that asks again gets it too."""
        name = f"{name}/verdict"
        verdict = self._verdicts[name] = Verdict(error)
        regions = self._register(verdict.segments)

        def released(_: Outcome) -> None:
            self._deregister(regions)
            if self._verdicts.get(name) is verdict:
                del self._verdicts[name]

        # A good verdict may be asked for again, until a later message shows that it was read; a bad one
        # is about this try alone, and after a tag there may be no later message.
        self._offer(name, verdict, released, peer, 1 if tag or error else _CONSUMERS)
        turn.keep_verdict(self._core, name)

    # -- both

    def _verdict_unread(self) -> bool:
        return any(
            not verdict.asked_for or self._core.is_streaming(name)
            for name, verdict in list(self._verdicts.items())
        )

    def _offer(
        self,
        name: str,
        source: MemorySource,
        released: Callable[[Outcome], None],
        peer: PeerAddress,
        consumers: int = _CONSUMERS,
    ) -> None:
        self._core.offer(name, source, released, OfferTerms(consumers, peer.engine_id, finished=True))

    def _subscribe(
        self, name: str, segments: Segments, peer: PeerAddress, deadline: float, at_end: AtEnd | None = None
    ) -> Outcome:
        """``at_end`` comes on the control thread: what follows from an outcome need not wait for this thread."""
        done: Future[Outcome] = Future()
        started: list[Subscription] = []

        def ended(outcome: Outcome) -> None:
            try:
                if at_end is not None:
                    at_end(outcome)
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(outcome)

        self._core.subscribe(
            peer, Wanted(name, MemoryTarget(segments), False, deadline), ended, started.append
        )
        try:
            return done.result(deadline + _GRACE_S)
        except FutureTimeout:
            raise MessageError(
                f"{name}: the control thread did not answer in {deadline + _GRACE_S} s"
            ) from None
        except BaseException:  # Ctrl-C: nothing may write into the caller's memory any more
            if started:
                self._core.cancel(started[0])
                done.exception(_GRACE_S)
            raise

    @contextmanager
    def _registered(self, *tables: Segments) -> Iterator[None]:
        regions = self._register(*tables)
        try:
            yield
        finally:
            self._deregister(regions)

    def _register(self, *tables: Segments) -> list[tuple[Any, int]]:
        return [
            (backend, backend.register_memory(int(address), int(length)))
            for table in tables
            for address, length in table
            if length
            for backend in self._core.backends.values()
        ]

    def _deregister(self, regions: Sequence[tuple[Any, int]]) -> None:
        for backend, region in regions:
            try:
                backend.deregister_memory(region)
            except ValueError:
                if not self._closed:  # all regions go with their backend
                    raise

    def _peer(self, rank: int) -> PeerAddress:
        if rank == self.rank or rank not in self._peers:
            others = sorted(set(self._peers) - {self.rank})
            raise ValueError(f"rank {rank} is no peer of rank {self.rank}; allowed: {others}")
        return self._peers[rank]

    @staticmethod
    def _name(source: str, target: str, tag: str, number: int) -> str:
        return f"sage/{source}>{target}/{tag}/{number}"


def _array(array: np.ndarray[Any, np.dtype[np.uint8]]) -> Segments:
    return np.array([(array.ctypes.data, array.nbytes)], dtype=np.uint64)


def _untagged(payload: Any) -> tuple[Any, str]:
    return (payload.payload, payload.tag) if isinstance(payload, Tagged) else (payload, "")


def _shown(tag: str) -> str:
    return f" with tag {tag!r}" if tag else ""
