# SPDX-License-Identifier: Apache-2.0
"""Consumers whose session was lost: for a moment each may come back over a new one, for the same transfer.

A subscription that comes back names the generation that it ``replaces``. Whoever does not come back in time is given
up. All of it is bounded. Control thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.timers import Timer
from sage_kv_connector.engine.session.session import Session, is_same_peer
from sage_kv_connector.engine.transfer.offer import Stream

#: Who is told of a lost connection dials at once; who must find out needs a while more.
RETURN_S = 5.0
MAX_LOST = 4096


class _Away(NamedTuple):
    stream: Stream
    timer: Timer
    on_stays_away: Callable[[], None]


class Returns:
    """Of one engine."""

    def __init__(self, loop: ControlLoop, longest_s: float) -> None:
        self._loop = loop
        self._wait_s = min(RETURN_S, longest_s)
        self._lost: dict[int, _Away] = {}

    def wait(self, stream: Stream, on_stays_away: Callable[[], None]) -> None:
        """``on_stays_away`` is called once, unless the consumer comes back."""
        if len(self._lost) >= MAX_LOST or stream.generation in self._lost:
            on_stays_away()
            return
        timer = self._loop.call_later(self._wait_s, self._over, stream.generation)
        self._lost[stream.generation] = _Away(stream, timer, on_stays_away)

    def came_back(self, session: Session, replaces: int) -> None:
        """A subscription of this session stands for that one."""
        lost = self._lost.get(replaces)
        if lost is not None and is_same_peer(lost.stream.session, session):
            del self._lost[replaces]
            lost.timer.cancel()

    def end(self, generations: Iterable[int]) -> None:
        """There is nothing to come back to: those of them that are away stay away."""
        for generation in generations:
            if (lost := self._lost.get(generation)) is not None:
                lost.timer.cancel()
                self._over(generation)

    def close(self) -> None:
        for lost in self._lost.values():
            lost.timer.cancel()

    def _over(self, generation: int) -> None:
        self._lost.pop(generation).on_stays_away()
