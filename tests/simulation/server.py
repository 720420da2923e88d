# SPDX-License-Identifier: Apache-2.0
"""One server of a simulation: an engine, its pages, and who may move when.

A page that nobody has is scribbled over, and must hold the scribble until somebody takes it: whoever writes into
freed memory is found, and whoever reads it sends what no request holds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.cache_view import CanonicalPlane, KVCacheView, group_view
from sage_kv_connector.contract.element_order import strided
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.core import EngineCore
from tests.simulation.stepped import SteppedBackend, SteppedLoop, stepped_data_plane, stepped_engine

LAYERS, HEADS, DIM, PAGES = 2, 2, 32, 24
SCRIBBLE = 0xDEAD
NEVER = (1 << 64) - 1
Elements = npt.NDArray[np.uint16]


class Layout(NamedTuple):
    """``fused``: the channels of K, then of V, of each token of each head; else all of K, then all of V."""

    page_size: int = 16
    fused: bool = False


class Memory:
    """The cache of one server; reused by the next schedule."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        size, item = layout.page_size, 2
        shape = (PAGES, HEADS, size, 2, DIM) if layout.fused else (PAGES, 2, size, HEADS, DIM)
        self._pages = np.full((LAYERS, *shape), SCRIBBLE, np.uint16)
        self.layers = list(self._pages)
        if layout.fused:
            token = 2 * DIM * item
            orders = strided(0, size * token, token, item), strided(DIM * item, size * token, token, item)
        else:
            plane, token = size * HEADS * DIM * item, HEADS * DIM * item
            orders = strided(0, DIM * item, token, item), strided(plane, DIM * item, token, item)
        planes = (CanonicalPlane("k", DIM, 0, orders[0]), CanonicalPlane("v", DIM, 0, orders[1]))
        named = [
            (f"layer{i}", [("kv", layer.reshape(PAGES, -1).view(np.uint8), ("page", "content"))])
            for i, layer in enumerate(self.layers)
        ]
        group = group_view("fullattention", size, PAGES, named, heads=HEADS, canonical=planes)
        self.view = KVCacheView((group,))
        packing = "fused" if layout.fused else "planes"
        self.schema = KVCacheSchema(
            "simulated", "m", "bf16", LAYERS, HEADS, 0, HEADS, DIM, (group.schema(),), packing=packing
        )

    def elements(self, layer: int, page: int) -> Elements:
        """Shape (2, tokens, heads, channels), whatever the layout; a view."""
        of_page: Elements = self.layers[layer][page]
        return of_page.transpose(2, 1, 0, 3) if self.layout.fused else of_page

    def scribbled(self, page: int) -> bool:
        return bool((self._pages[:, page] == SCRIBBLE).all())

    def scribble(self, page: int) -> None:
        self._pages[:, page] = SCRIBBLE


_spare: dict[Layout, list[Memory]] = {}


def borrow(layout: Layout) -> Memory:
    spare = _spare.setdefault(layout, [])
    return spare.pop() if spare else Memory(layout)


def give_back(memory: Memory) -> None:
    memory._pages[:] = SCRIBBLE
    _spare[memory.layout].append(memory)


@cache
def _config(options: tuple[tuple[str, Any], ...]) -> KVTransportConfig:
    return KVTransportConfig.load(dict(options))


class Server:
    """``name``: its engine id; ``port``: what tells it from others. It runs until ``kill`` or ``stop``."""

    def __init__(
        self,
        wire: Any,
        name: str,
        port: int,
        layout: Layout,
        options: dict[str, Any],
        lanes: int,
        staging_bytes: int,
        knows_pages: bool = True,
    ) -> None:
        self.name = name
        self.host = f"127.0.0.1:{port}"
        self.memory = borrow(layout)
        self.free = list(range(PAGES))
        self.alive = True
        self.ended_at: float | None = None
        self.stopped_until = 0  #: nothing of it moves before
        self.busy_until = 0  #: nor does its control thread
        self.wrong: list[str] = []
        with stepped_engine(lambda: SteppedBackend(wire, self.host, lanes, knows_pages), staging_bytes):
            self.core = EngineCore(
                _config(tuple(sorted(options.items()))), engine_id=name, schema=self.memory.schema
            )
            self.core.register_memory(self.memory.view.extents())
            self.core.start()
        self.loop: SteppedLoop = self.core._loop  # type: ignore[assignment]
        backend = self.core.backends["stepped"]
        assert isinstance(backend, SteppedBackend)
        self.endpoint = backend.endpoint
        assert self.core._conversions is not None
        self.pool = self.core._conversions.pool

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self.name, 0, (f"stepped://{self.host}",))

    # -- pages

    def take(self, count: int) -> list[int] | None:
        if len(self.free) < count:
            return None
        taken = [self.free.pop(0) for _ in range(count)]
        for page in taken:
            self._check_untouched(page)
        return taken

    def put_back(self, pages: list[int]) -> None:
        for page in pages:
            self.memory.scribble(page)
        self.free += pages

    def _check_untouched(self, page: int) -> None:
        if not self.memory.scribbled(page):
            self.wrong.append(f"{self.name}: page {page} was written while nobody had it")
            self.memory.scribble(page)

    # -- life

    def due(self, now_ns: int, ready: list[tuple[Server | None, int]]) -> int:
        """Add what may move now: 0 control thread, 1 lanes, 2 conversions. Returns when the next one may, of others."""
        events, lanes, converting = stepped_data_plane.pending(self.endpoint, self.pool)
        nearest: int = max(lanes, self.stopped_until)
        if nearest <= now_ns:
            ready.append((self, 1))
            nearest = NEVER
        if not self.loop.death:
            control = 0 if events else self.loop.next_due(now_ns)
            if control is not None:
                control = max(control, self.stopped_until, self.busy_until)
                if control <= now_ns:
                    ready.append((self, 0))
                elif control < nearest:
                    nearest = control
        if converting:
            if self.stopped_until <= now_ns:
                ready.append((self, 2))
            else:
                nearest = min(nearest, self.stopped_until)
        return nearest

    def move(self, activity: int) -> None:
        if activity == 0:
            self.loop.turn()
        elif activity == 1:
            self.endpoint.step()
        else:
            stepped_data_plane.step_pool(self.pool)

    def kill(self) -> None:
        """The process is gone; its peers see what the wire shows them."""
        if self.alive:
            self.alive, self.ended_at = False, time.monotonic()
            self.endpoint.die()
            self._free()

    def die(self) -> None:
        """Its control thread ends; the process lives."""
        if self.alive:
            self.loop.die()

    def stop(self) -> None:
        """As an operator would."""
        if self.alive:
            self.alive, self.ended_at = False, time.monotonic()
            self.core.close()
            self._free()

    def _free(self) -> None:
        self.loop.stop()
        if self.core._conversions is not None:
            self.core._conversions.close()
        for backend in self.core.backends.values():
            backend.close()

    def held(self) -> list[str]:
        """What a server without work still has, that it should not."""
        counters = self.core.counters()
        names = ("offers", "subscriptions", "questions", "windows", "posts", "staging_bytes", "conversions")
        found = [f"{self.name} holds {counters[name]} {name}" for name in names if counters[name]]
        found += [
            f"{self.name} holds the session with {session.label} {session._holders} times"
            for session in self.core.sessions._sessions.values()
            if session._holders and not self.loop.death
        ]
        producer, windows = self.core._producer, self.core._consumer._windows
        tables: dict[str, Sized] = {
            "consumers": producer._offers._consumers,
            "posts of streams": producer.posts._posts,
            "receivers of windows": windows._receivers,
            "owners of generations": windows._owners,
            "lost consumers": producer._returns._lost,
            "dials": self.core.sessions._dials,
        }
        if not self.loop.death:  # nobody is left to take events
            found += [f"{self.name} remembers {len(table)} {name}" for name, table in tables.items() if table]
        if self.loop.timers and not self.loop.death:
            found.append(f"{self.name} has {self.loop.timers} timers")
        for page in self.free:
            self._check_untouched(page)
        return found + self.wrong + [f"{self.name}: {fault}" for fault in self.loop.faults]


@contextmanager
def closing(servers: list[Server]) -> Iterator[None]:
    """Whatever comes, their descriptors and memory are given back."""
    try:
        yield
    finally:
        for server in servers:
            server.kill()
            give_back(server.memory)
