# SPDX-License-Identifier: Apache-2.0
"""Consumers whose session was lost: for a moment each may come back over a new one, for the same transfer.

A subscription that comes back names the generation that it ``replaces``. Whoever does not come back in time is given
up. All of it is bounded. Control thread only.
"""

from __future__ import annotations

from collections.abc import Callable

from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.timers import Timer
from sage_kv_connector.engine.session.session import Session, is_same_peer
from sage_kv_connector.engine.transfer.offer import Stream

#: Who is told of a lost connection dials at once; who must find out needs a while more.
RETURN_S = 5.0
MAX_LOST = 4096


class Returns:
    """Of one engine."""

    def __init__(self, loop: ControlLoop, longest_s: float) -> None:
        self._loop = loop
        self._wait_s = min(RETURN_S, longest_s)
        self._lost: dict[int, tuple[Stream, Timer]] = {}

    def wait(self, stream: Stream, on_stays_away: Callable[[], None]) -> None:
        """``on_stays_away`` is called once, unless the consumer comes back."""
        if len(self._lost) >= MAX_LOST or stream.generation in self._lost:
            on_stays_away()
            return
        timer = self._loop.call_later(self._wait_s, self._over, stream.generation, on_stays_away)
        self._lost[stream.generation] = stream, timer

    def came_back(self, session: Session, replaces: int) -> None:
        """A subscription of this session stands for that one."""
        lost = self._lost.get(replaces)
        if lost is not None and is_same_peer(lost[0].session, session):
            del self._lost[replaces]
            lost[1].cancel()

    def close(self) -> None:
        for _, timer in self._lost.values():
            timer.cancel()

    def _over(self, generation: int, on_stays_away: Callable[[], None]) -> None:
        del self._lost[generation]
        on_stays_away()
