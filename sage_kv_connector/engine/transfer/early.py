# SPDX-License-Identifier: Apache-2.0
"""What came before its offer: subscriptions that wait for it, releases, and transfers given up in advance.

All three are bounded. A waiting stream holds its session and has a timer. Control thread only.
"""

from __future__ import annotations

from collections import OrderedDict

from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.session import messages as m
from sage_kv_connector.engine.session.session import Session
from sage_kv_connector.engine.transfer.offer import Stream

#: Subscriptions that may wait for their offer, and releases that came before it.
MAX_EARLY = 4096


class Early:
    """Of one engine."""

    def __init__(self, loop: ControlLoop, timeout_s: float) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._waiting: dict[int, Stream] = {}
        self._unwanted: OrderedDict[str, list[m.Release]] = OrderedDict()
        self._given_up: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, stream: Stream) -> None:
        """A subscription whose transfer is not on offer: it waits, or fails at once."""
        request = stream.request
        if request.transfer_id in self._given_up:
            stream.fail("unknown_transfer", self._given_up[request.transfer_id])
        elif request.finished:
            stream.fail("unknown_transfer", "never offered here, or released already (lease expired)")
        elif len(self._waiting) >= MAX_EARLY or request.generation in self._waiting:
            stream.fail("busy", f"more than {MAX_EARLY} subscriptions wait for their prefill")
        else:
            self._waiting[request.generation] = stream
            stream.session.hold()
            stream.timer = self._loop.call_later(
                min(self._timeout_s, request.timeout_ms / 1000),
                self._drop,
                stream,
                "no prefill with this transfer id arrived in time",
            )

    def take(self, transfer_id: str) -> tuple[list[Stream], list[m.Release]]:
        """What came for a transfer that is on offer now; its streams go on holding their sessions."""
        self._given_up.pop(transfer_id, None)
        streams = [s for s in self._waiting.values() if s.transfer_id == transfer_id]
        for stream in streams:
            del self._waiting[stream.generation]
        return streams, self._unwanted.pop(transfer_id, [])

    def give_up(self, transfer_id: str, detail: str) -> None:
        """Whoever waits for it, or subscribes to it from now on, is told at once."""
        for stream in [s for s in self._waiting.values() if s.transfer_id == transfer_id]:
            self._drop(stream, detail)
        self._given_up[transfer_id] = detail
        while len(self._given_up) > MAX_EARLY:
            self._given_up.popitem(last=False)

    def cancel(self, session: Session, consumer: int) -> None:
        """A consumer stopped to wait."""
        for stream in [s for s in self._waiting.values() if s.consumer == consumer]:
            if stream.session is session:
                self._leave(stream, "the consumer cancelled it")

    def on_closed(self, session: Session, why: str) -> None:
        for stream in [s for s in self._waiting.values() if s.session is session]:
            self._leave(stream, f"the session was lost: {why}")

    def remember(self, release: m.Release) -> None:
        """A consumer gave up what was not offered yet."""
        self._unwanted.setdefault(release.transfer_id, []).append(release)
        while len(self._unwanted) > MAX_EARLY:
            self._unwanted.popitem(last=False)

    def _leave(self, stream: Stream, why: str) -> None:
        self._drop(stream, "")
        self.remember(m.Release(stream.transfer_id, stream.request.consumers, why))

    def _drop(self, stream: Stream, detail: str) -> None:
        if self._waiting.pop(stream.generation, None) is None:
            return
        stream.stop()
        if detail:
            stream.fail("unknown_transfer", detail)
