# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode server whose metrics are read at every place: their own /metrics, and an exporter's."""

from __future__ import annotations

import random
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from integration_tests.cluster import wait_until
from integration_tests.leaving_client import leaving
from integration_tests.scraped import Scrape, scrape
from integration_tests.tcp_proxy import TcpProxy
from integration_tests.telemetry_checks import ROLES, Between, Ledger, Moved
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine import EngineCore
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError, console_script, running
from sage_kv_connector.telemetry.reading import sources
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV
from sage_kv_connector.telemetry.recording.snapshot import Snapshot

#: Leases and deadlines: short, so that those which end do so soon; who lost its session is waited for 5 s, no lease
#: is to end before that.
TIMES = {"lease_s": 6, "deadline_s": 30, "peer_timeout_s": 6, "unmatched_timeout_s": 15}
METRICS, EXPORTER = "/metrics", "exporter"
WATCHED_EVERY_S = 0.3
#: Until all leases ended.
OVER_S = 25.0
#: Until an engine told at its own /metrics what it told the exporter.
TOLD_S = 5.0
#: Requests of a mixed load at a time.
AT_ONCE = 4

#: Of one moment, by role and place.
Reading = dict[tuple[str, str], Scrape]


@dataclass
class WatchedPair:
    """``settle``: makes both servers tell at /metrics what they know. Decode reaches prefill through ``proxy``."""

    prefill: Process
    decode: Process
    exporter: Process
    proxy: TcpProxy
    settle: Callable[[], None]
    security: str
    moved: Moved = field(default_factory=Moved)

    def server(self, role: str) -> Process:
        return self.prefill if role == "prefill" else self.decode

    def snapshots(self) -> list[Snapshot]:
        return sources.exporter(self.exporter.url)().snapshots

    def engine_id(self, role: str) -> str:
        """How the exporter names the engine of this server's processes."""
        return self._snapshot(role).engine

    def started(self, role: str) -> float:
        return self._snapshot(role).started

    def _snapshot(self, role: str) -> Snapshot:
        pids = set(self.server(role).pids())
        found = [one for one in self.snapshots() if one.process in pids]
        if len(found) != 1:
            raise ServerError(f"the exporter shows {len(found)} engines of {role}, one runs")
        return found[0]

    def read(self) -> Reading:
        """Every place, once all transfers are over and told."""
        wait_until(lambda: not self._held(), OVER_S, lambda: f"the engines still hold {self._held()}")
        until = time.monotonic() + TOLD_S
        while True:
            self.settle()
            found = self._read()
            told = all(
                found[role, METRICS].sum(name) == found[role, EXPORTER].sum(name)
                for role in ROLES
                for name in ("transfers_total", "failed_loads_total", "failed_offers_total")
            )
            if told or time.monotonic() > until:  # the checks say what differs
                return found

    def _read(self) -> Reading:
        found: Reading = {}
        for role in ROLES:
            found[role, METRICS] = scrape(self.server(role).url)
            found[role, EXPORTER] = scrape(self.exporter.url, self.engine_id(role))
        for (role, place), said in found.items():
            self.moved.hear(f"{role}, {place}", said)
        return found

    def _held(self) -> dict[str, float]:
        names = ("offers", "on_offer", "subscriptions", "loads", "posts")
        snapshots = [self._snapshot(role) for role in ROLES]
        held = {name: sum(one.value(name) for one in snapshots) for name in names}
        return {name: value for name, value in held.items() if value}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Read every place again and again meanwhile: gauges that come and go are seen, and what goes back."""
        ends = threading.Event()

        def watch() -> None:
            while not ends.wait(WATCHED_EVERY_S):
                self._read()

        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                yield
            finally:
                ends.set()
        watching.result()  # raises what ended it

    def restart_decode(self) -> str:
        """Returns what is wrong with what the exporter says while decode is away; "" if nothing is."""
        self.decode.stop()
        engines = scrape(self.exporter.url)
        counts = engines.sum("engines"), engines.sum("silent_engines")
        self.decode.start()
        self.decode.wait_until_healthy()
        self.moved.begins_anew(*(f"decode, {place}" for place in (METRICS, EXPORTER)))
        return "" if counts == (1, 0) else f"without decode the exporter counts {counts}, expected (1, 0)"

    def hold_at(self, after: int) -> None:
        """Nothing more comes after so many bytes, counted once none of an earlier transfer is on its way."""
        before = -1
        while before != self.proxy.passed:
            before = self.proxy.passed
            time.sleep(0.5)
        self.proxy.hold_at(after)

    def is_held(self) -> bool:
        """Wait until it is, and decode waits for the rest."""
        if not self.proxy.held.wait(30):
            return False
        wait_until(lambda: self._snapshot("decode").value("subscriptions") > 0, 10.0)
        return True

    def decode_is_left(
        self, path: str, body: dict[str, Any], waits_for: Callable[[], bool] | None = None
    ) -> None:
        """Its client asks, and hangs up after the first token, or after ``waits_for``."""
        with leaving(self.decode, path, body) as connection:
            if waits_for is None:
                connection.getresponse().readline()
            elif not waits_for():
                raise ServerError("the transfer had ended before its client left")

    @contextmanager
    def flipping(self, after: int) -> Iterator[None]:
        """A byte changes, so many bytes from now; some chunks later nothing more comes until this ends."""
        self.hold_at(4 * after)
        self.proxy.flip_byte_at(after)
        try:
            yield
        finally:
            self.proxy.let_go()
        if not self.proxy.flipped:
            raise ServerError(f"fewer than {after} bytes came, none was changed")

    def dialled_by_a_stranger(self, ledger: Ledger) -> None:
        """Somebody with another secret asks prefill for something."""
        with stranger(self.security) as core:
            core.renew(
                PeerAddress(self.engine_id("prefill"), 0, (f"tcp://127.0.0.1:{self.proxy.port}",)),
                ("anything",),
            )
            wait_until(lambda: bool(dials_of(core)), 10.0, lambda: "prefill did not refuse the stranger")
        ledger.failed("prefill", "refused_peers_total", code="bad_secret")


def dials_of(core: EngineCore) -> list[str]:
    return [sample.labels[0] for sample in core.recorder.samples() if sample.metric == "dials_total"]


@contextmanager
def stranger(security: str) -> Iterator[EngineCore]:
    """An engine with another secret; it listens, too."""
    secret = secrets.token_urlsafe(16)
    config = KVTransportConfig(
        backend="tcp", host="127.0.0.1", secret=secret, security=security, telemetry=False
    )
    core = EngineCore(config, engine_id="stranger")
    core.start()
    try:
        yield core
    finally:
        core.close()


def between(before: Reading, after: Reading) -> dict[tuple[str, str], Between]:
    return {key: Between(*key, before[key], after[key]) for key in after}


@contextmanager
def telemetry_folder() -> Iterator[Path]:
    """Where the sockets of these servers alone lie; a short path, as sockets want it."""
    folder = tempfile.mkdtemp(prefix="kvt-", dir="/tmp")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def exporter_of(folder: Path, scratch: Path) -> Process:
    """An exporter of the engines whose sockets lie in ``folder``, not yet started."""
    port = free_port()
    command = [console_script("sage-kvt"), "exporter", "--port", str(port)]
    env = {DIRECTORY_ENV: str(folder)}
    return Process("exporter", command, port, scratch / "exporter.log", env, health="/healthz")


@contextmanager
def watched_pair(
    prefill: Process,
    decode: Process,
    proxy: TcpProxy,
    folder: Path,
    settle: Callable[[], None],
    security: str,
) -> Iterator[WatchedPair]:
    exporter = exporter_of(folder, prefill.log.parent)
    with running(exporter, prefill, decode):
        yield WatchedPair(prefill, decode, exporter, proxy, settle, security)


def at_once(*tasks: Callable[[], object]) -> None:
    """In any order, some at a time. Raises what the first that failed raised."""
    shuffled = random.sample(tasks, len(tasks))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(task) for task in shuffled]:
            done.result()
