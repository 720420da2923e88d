# SPDX-License-Identifier: Apache-2.0
"""What came before its offer: subscriptions that wait for it, releases, and transfers given up in advance.

A subscription waits long for an id that nobody offered yet, and ``SIBLING_S`` where something is known of the id
that it can't have: another prompt's KV, or KV that others fetched. A request with several prompts has several offers
of one id, which come one after the other.

All of it is bounded. A waiting stream holds its session and has a timer. Control thread only.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session, is_same_peer
from sage_kv_connector.engine.transfer.offer import Offer, Stream

#: Subscriptions that may wait for their offer, and releases that came before it.
MAX_EARLY = 4096
#: Of one peer, so that it leaves room for the others.
MAX_EARLY_A_PEER = 1024
#: The offers of one request's prompts come within this time of each other.
SIBLING_S = 0.5
#: Who finds no place to wait may ask again after this time.
BUSY_S = 1.0

NEVER_OFFERED = Reason(Code.UNKNOWN_TRANSFER, "never offered here, or released already (lease expired)")
NOT_IN_TIME = Reason(Code.UNKNOWN_TRANSFER, "no prefill with this transfer id arrived in time")

_Why = TypeVar("_Why", str, Reason)


class Early:
    """Of one engine. ``on_late(stream, why)``: it waited in vain, and holds its session no more."""

    def __init__(
        self, loop: ControlLoop, timeout_s: float, on_late: Callable[[Stream, Reason], None]
    ) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._on_late = on_late
        self._waiting: dict[int, Stream] = {}
        self._of_peer: Counter[Hashable] = Counter()
        self._released_by: Counter[Hashable] = Counter()
        self._unwanted: OrderedDict[str, list[tuple[Hashable, m.Release]]] = OrderedDict()
        self._given_up: OrderedDict[str, Reason] = OrderedDict()
        self._gone: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, stream: Stream, difference: Reason | None) -> None:
        """A subscription whose transfer is not on offer: it waits, or fails at once.

        ``difference``: what stands between it and an offer of its id.
        """
        request = stream.request
        if request.transfer_id in self._given_up:
            stream.fail(self._given_up[request.transfer_id])
            return
        gone = self._gone.get(request.transfer_id, "")
        known = difference or (Reason(Code.UNKNOWN_TRANSFER, gone) if gone else None)
        if request.finished:
            stream.fail(known or NEVER_OFFERED)
        elif len(self._waiting) >= MAX_EARLY or request.generation in self._waiting:
            busy = Reason(Code.BUSY, f"more than {MAX_EARLY} subscriptions wait for their prefill")
            stream.fail(busy, again_s=BUSY_S)
        elif self._of_peer[stream.owner] >= MAX_EARLY_A_PEER:
            busy = Reason(Code.BUSY, f"{MAX_EARLY_A_PEER} subscriptions of this peer wait for their prefill")
            stream.fail(busy, again_s=BUSY_S)
        else:
            self._waiting[request.generation] = stream
            self._of_peer[stream.owner] += 1
            stream.session.hold()
            self._wait(stream, SIBLING_S if known else self._timeout_s, known or NOT_IN_TIME)

    def fitting(self, offer: Offer) -> list[Stream]:
        """Those that mean this offer. Those that name it and don't fit won't wait much longer."""
        found = []
        for stream in self._waiting.values():
            request = stream.request
            if request.transfer_id in offer.names:
                difference = offer.differs(request.prompt)
                if difference is None:
                    found.append(stream)
                else:
                    self._wait(stream, SIBLING_S, difference)
            elif request.prompt.digest and offer.prompt is not None and request.prompt == offer.prompt.whole:
                found.append(stream)
        return found

    def take(self, stream: Stream) -> None:
        """Its offer is there; it goes on holding its session."""
        self._forget(stream)

    def leave_to_siblings(self, stream: Stream) -> None:
        """It fits an offer that others took; another one of the same prompt may follow."""
        self._wait(stream, SIBLING_S, Reason(Code.UNKNOWN_TRANSFER, "as many as were expected fetch it"))

    def take_releases(self, offer: Offer) -> list[m.Release]:
        """Releases of this offer; what was said of its id before is over."""
        taken: list[m.Release] = []
        for name in offer.names:
            self._given_up.pop(name, None)
            self._gone.pop(name, None)
            releases = self._take_unwanted(name)
            taken += [one for _, one in releases if offer.differs(one.prompt) is None]
            for owner, one in releases:
                if offer.differs(one.prompt) is not None:
                    self.remember(one, owner)
        return taken

    def give_up(self, transfer_id: str, why: Reason) -> None:
        """Whoever waits for it, or subscribes to it from now on, is told at once."""
        for stream in [s for s in self._waiting.values() if s.transfer_id == transfer_id]:
            self._drop(stream)
            stream.fail(why)
        _remember(self._given_up, transfer_id, why)

    def gone(self, offer: Offer, why: str) -> None:
        """It is on offer no more: whoever subscribes to it hears why."""
        for name in offer.names:
            _remember(self._gone, name, why or "it was fetched, or nobody needed it")

    def cancel(self, session: Session, generation: int) -> None:
        """A consumer stopped to wait."""
        stream = self._waiting.get(generation)
        if stream is not None and stream.session is session:
            self._drop(stream)
            self.remember(stream.release("the consumer cancelled it"), stream.owner)

    def take_lost(self, session: Session) -> list[Stream]:
        """Those of a session that is gone wait no more."""
        lost = [stream for stream in self._waiting.values() if stream.session is session]
        for stream in lost:
            self._drop(stream)
        return lost

    def replaced(self, session: Session, generation: int) -> None:
        """The same consumer asks again, over another session."""
        stream = self._waiting.get(generation)
        if stream is not None and is_same_peer(stream.session, session):
            self._drop(stream)

    def close(self, why: Reason) -> None:
        """Nobody waits any longer."""
        for stream in list(self._waiting.values()):
            self._drop(stream)
            stream.fail(why)

    def remember(self, release: m.Release, owner: Hashable) -> None:
        """A consumer gave up what was not offered yet. One that gives up too much is waited for."""
        if self._released_by[owner] >= MAX_EARLY_A_PEER:
            return
        self._released_by[owner] += 1
        self._unwanted.setdefault(release.transfer_id, []).append((owner, release))
        while len(self._unwanted) > MAX_EARLY:
            self._take_unwanted(next(iter(self._unwanted)))

    def _take_unwanted(self, transfer_id: str) -> list[tuple[Hashable, m.Release]]:
        taken = self._unwanted.pop(transfer_id, [])
        for owner, _ in taken:
            self._released_by[owner] -= 1
            if not self._released_by[owner]:
                del self._released_by[owner]
        return taken

    def _wait(self, stream: Stream, limit_s: float, why: Reason) -> None:
        """A stream that has a timer keeps it if that is due earlier."""
        limit_s = min(limit_s, stream.request.timeout_ms / 1000)
        if stream.timer is not None:
            if stream.waits_s <= limit_s:
                return
            stream.timer.cancel()
        stream.waits_s = limit_s
        stream.timer = self._loop.call_later(limit_s, self._late, stream, why)

    def _late(self, stream: Stream, why: Reason) -> None:
        self._drop(stream)
        self._on_late(stream, why)

    def _drop(self, stream: Stream) -> None:
        if self._forget(stream):
            stream.stop()
            stream.timer = None

    def _forget(self, stream: Stream) -> bool:
        if self._waiting.pop(stream.generation, None) is None:
            return False
        self._of_peer[stream.owner] -= 1
        if not self._of_peer[stream.owner]:
            del self._of_peer[stream.owner]
        return True


def _remember(table: OrderedDict[str, _Why], transfer_id: str, why: _Why) -> None:
    table[transfer_id] = why
    table.move_to_end(transfer_id)
    while len(table) > MAX_EARLY:
        table.popitem(last=False)
