# SPDX-License-Identifier: Apache-2.0
"""Runs one schedule: what moves next is drawn by seed, time passes when nothing can move."""

from __future__ import annotations

import heapq
import random
import zlib
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

from tests.simulation.decode import DecodeLoad
from tests.simulation.faults import begin_fault
from tests.simulation.prefill import PrefillRequest
from tests.simulation.schedule import Schedule
from tests.simulation.server import NEVER, Server, closing
from tests.simulation.stepped import VirtualClock, small_bounds, stepped_data_plane
from tests.simulation.verdict import wrong_at_the_end

#: More steps than any schedule needs: something turns round.
MOST_STEPS = 200_000
#: Whatever never ends by itself is aborted then; it is longer than every lease and deadline.
AT_LAST_S = 200.0
#: A step takes up to this long.
STEP_NS = 20_000


class Result(NamedTuple):
    """``wrong``: what did not hold; ``trace``: the same for the same schedule."""

    wrong: tuple[str, ...]
    right: int
    failures: dict[str, int]
    steps: int
    trace: int


class World:
    """``wrong`` collects what did not hold while it ran."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.clock = VirtualClock()
        self.rng = random.Random(schedule.seed ^ 0x5EED)
        self.wire: Any = stepped_data_plane.Wire(seed=schedule.seed)
        options = schedule.options
        self.wire.manners(
            pulls=options.pulls, packets=options.packets, corrupt=options.corrupt, duplicate=options.duplicate
        )
        self.latency(options.longest_s)
        self.servers: list[Server] = []  #: all that ever were
        self.wrong: list[str] = []
        self.right = 0
        self.failures: dict[str, int] = {}
        self._running: list[Server] = []  #: prefill's, then decode's
        self._incarnations = count(1)
        self._plans: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = count()
        self._lost: dict[Server, float] = {}
        self._steps = self._trace = 0

    def run(self) -> Result:
        schedule = self.schedule
        with self.clock.running(), small_bounds(), closing(self.servers):
            self._running = [self.start(i) for i in range(schedule.prefills + schedule.decodes)]
            prefills = [PrefillRequest(self, request) for request in schedule.requests]
            loads = [DecodeLoad(self, p, load) for p in prefills for load in p.request.loads]
            for prefill in prefills:
                self.after(prefill.request.offered_s, prefill.begin)
                self.after(AT_LAST_S, prefill.give_up_at_last)
            for load in loads:
                self.after(load.load.at_s, load.begin)
            for fault in schedule.faults:
                self.after(fault.at_s, begin_fault, self, fault)
            self._move()
            self.wrong += wrong_at_the_end(self, prefills, loads)
            for server in self.servers:
                if server.alive:
                    self.wrong += server.held()
                    server.stop()
        return Result(tuple(self.wrong), self.right, self.failures, self._steps, self._trace)

    # -- for what happens in it

    def after(self, delay_s: float, function: Callable[..., None], *arguments: Any) -> None:
        at = self.clock.ns + int(delay_s * 1e9)
        heapq.heappush(self._plans, (at, next(self._sequence), function, arguments))

    def prefill(self, index: int) -> Server:
        return self._running[index]

    def decode(self, index: int) -> Server:
        return self._running[self.schedule.prefills + index]

    def server(self, index: int) -> Server:
        return self._running[index]

    def start(self, index: int) -> Server:
        """A new server, in place ``index``."""
        options, decodes = self.schedule.options, index >= self.schedule.prefills
        port = next(self._incarnations)
        server = Server(
            self.wire,
            f"{'d' if decodes else 'p'}{index}.{port}",
            port,
            options.layouts[decodes],
            {
                name: getattr(options, name)
                for name in (
                    "deadline_s", "lease_s", "unmatched_timeout_s", "peer_timeout_s", "connect_timeout_s", "integrity",
                )
            },
            options.lanes,
            options.staging_bytes,
            options.knows_pages,
        )  # fmt: skip
        self.servers.append(server)
        return server

    def restart(self, index: int) -> None:
        self._running[index] = self.start(index)

    def latency(self, longest_s: float) -> None:
        shortest = self.schedule.options.shortest_s
        self.wire.latency(shortest_ns=int(shortest * 1e9), longest_ns=int(max(shortest, longest_s) * 1e9))

    def lose(self, server: Server, seconds: float) -> None:
        """Its threads can't move for so long: what it answers may be that late."""
        self._lost[server] = self.lost_s(server) + seconds

    def lost_s(self, server: Server) -> float:
        return self._lost.get(server, 0.0)

    # -- time

    def _move(self) -> None:
        rng, clock = self.rng, self.clock
        while True:
            now, nearest = clock.ns, NEVER
            ready: list[tuple[Server | None, int]] = []
            if self._plans:
                nearest = self._plans[0][0]
                if nearest <= now:
                    ready.append((None, 0))
                    nearest = NEVER
            for server in self.servers:
                if server.alive:
                    nearest = min(nearest, server.due(now, ready))
            if not ready:
                if nearest == NEVER:
                    return
                clock.advance_to(nearest)
                continue
            self._steps += 1
            if self._steps > MOST_STEPS:
                self.wrong.append(f"it does not come to rest within {MOST_STEPS} steps")
                return
            chosen, activity = ready[int(rng.random() * len(ready))]
            if chosen is None:
                _, _, function, arguments = heapq.heappop(self._plans)
                function(*arguments)
            else:
                chosen.move(activity)
            clock.advance_to(now + 1 + int(rng.random() * STEP_NS))
            name = chosen.name if chosen else ""
            self._trace = zlib.crc32(f"{now} {name} {activity}".encode(), self._trace)
