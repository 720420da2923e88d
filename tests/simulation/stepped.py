# SPDX-License-Identifier: Apache-2.0
"""An engine without threads: its control loop, lanes and conversions move when they are told, by a virtual clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from unittest import mock

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Capabilities
from sage_kv_connector.backends.native import NativeBackend
from sage_kv_connector.engine import core as core_module
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.conversion import chosen, staging
from sage_kv_connector.engine.conversion.jobs import CpuConversions
from sage_kv_connector.engine.transfer import early

#: What the data plane has in builds with SAGE_KVT_SIMULATION only.
stepped_data_plane: Any = _data_plane

BEGINNING_NS = 1_000_000_000_000
#: Parts this small come in numbers even of the small caches here.
PART_BYTES = 4096
CHUNK_BYTES = 4096
CONVERTING_THREADS = 2
#: Some more than the requests of any schedule.
EARLY_A_PEER = 16
PLANTED_DEATH = "planted in the simulation"


class VirtualClock:
    """CLOCK_MONOTONIC for Python and the data plane while ``running``."""

    def __init__(self) -> None:
        self.ns = BEGINNING_NS

    @property
    def seconds(self) -> float:
        return self.ns / 1e9

    def advance_to(self, ns: int) -> None:
        self.ns = max(self.ns, ns)
        stepped_data_plane.simulate_now(self.ns)

    @contextmanager
    def running(self) -> Iterator[None]:
        with (
            mock.patch.object(time, "monotonic", lambda: self.ns / 1e9),
            mock.patch.object(time, "monotonic_ns", lambda: self.ns),
        ):
            stepped_data_plane.simulate_now(self.ns)
            try:
                yield
            finally:
                stepped_data_plane.simulate_now(0)


class SteppedLoop(ControlLoop):
    """``turn`` is one round of what the thread would do."""

    def __init__(self, on_death: Callable[[str], None] | None = None) -> None:
        super().__init__(on_death)
        self._sources: list[tuple[Any, Callable[..., object], tuple[Any, ...]]] = []
        self._inside = False
        self.faults: list[str] = []  #: what a real one would have logged, and gone on

    def watch(self, source: Any, handler: Callable[..., object], *first: Any) -> None:
        self._sources.append((source, handler, first))

    def start(self) -> None:
        pass

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        self._orders.append((time.monotonic_ns(), function, arguments))
        if self.death:
            self._run_leftovers()

    def call(self, timeout_s: float, function: Callable[..., object], *arguments: Any) -> None:
        if self._inside or self._stopping or self.death:
            function(*arguments)
            return
        done: Future[None] = Future()

        def settle() -> None:
            try:
                function(*arguments)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        self.submit(settle)
        self.turn()
        done.result(0)

    def die(self) -> None:
        """As by a fault that no guard expects."""
        if not self.death:
            self._die(SystemExit(PLANTED_DEATH))

    def turn(self) -> None:
        self._inside = True
        try:
            self._turn()
        finally:
            self._inside = False

    def _take_events(self) -> list[tuple[int, Callable[..., object], tuple[Any, ...]]]:
        return [
            (event.time_ns, handler, (*first, event))
            for source, handler, first in self._sources
            for event in source.poll()
        ]

    def _guarded(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")

    def next_due(self, now_ns: int) -> int | None:
        """When there is something to do without an event, now or later; None: never."""
        if self._orders:
            return 0
        left_s = self._timers.next_timeout()
        if left_s < 0:
            return None
        return now_ns + int(left_s * 1e9) + 1 if left_s else 0

    @property
    def timers(self) -> int:
        """Those that are to fire."""
        return 0 if self._timers.next_timeout() < 0 else len(self._timers)


class SteppedBackend(NativeBackend):
    """Over the simulated wire; ``host`` is where it listens."""

    capabilities = Capabilities("stepped", rank=0, crosses_nodes=True, pages=True, parts=True)

    def __init__(self, wire: Any, host: str, lanes: int, knows_pages: bool) -> None:
        self.endpoint = stepped_data_plane.SteppedEndpoint(
            wire=wire, lanes=lanes, chunk_bytes=CHUNK_BYTES, host=host
        )
        super().__init__(self.endpoint)
        if not knows_pages:
            self.capabilities = self.capabilities._replace(pages=False)  # type: ignore[misc]


@contextmanager
def stepped_engine(make_backend: Callable[[], SteppedBackend], staging_bytes: int) -> Iterator[None]:
    """Engines that are made meanwhile are stepped ones."""

    def conversions(threads: int, _: int, register: Callable[[int, int], None]) -> CpuConversions:
        return CpuConversions(CONVERTING_THREADS, staging_bytes, register)

    with (
        mock.patch.object(core_module, "ControlLoop", SteppedLoop),
        mock.patch.object(core_module, "enabled_backends", lambda config, **_: ("stepped",)),
        mock.patch.object(core_module, "create_backend", lambda name, options: make_backend()),
        mock.patch.object(core_module, "publish", lambda take: None),  # it has a thread and a socket
        mock.patch.object(chosen, "CpuConversions", conversions),
        mock.patch.object(_data_plane, "ConversionPool", stepped_data_plane.stepped_pool),
    ):
        yield


@contextmanager
def small_bounds() -> Iterator[None]:
    with (
        mock.patch.object(staging, "SMALLEST_PART_BYTES", PART_BYTES),
        mock.patch.object(staging, "LARGEST_PART_BYTES", PART_BYTES),
        mock.patch.object(early, "MAX_EARLY", 4 * EARLY_A_PEER),
        mock.patch.object(early, "MAX_EARLY_A_PEER", EARLY_A_PEER),
    ):
        yield
