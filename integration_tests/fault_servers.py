# SPDX-License-Identifier: Apache-2.0
"""Servers that faults are tried on, what a client is told, and what the servers hold afterwards."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from integration_tests.cluster import gauges, holdings, shared_memory_files
from integration_tests.tcp_proxy import TcpProxy
from sage_kv_connector.integrations.common.free_port import free_port
from sage_kv_connector.launch.process import Process, ServerError

#: Short, so that what hangs on them is seen.
TIMES = {"lease_s": 4, "deadline_s": 15, "peer_timeout_s": 6, "unmatched_timeout_s": 6}
#: A client waits this long; an answer that did not come by then never came.
PATIENCE_S = 60.0
#: What SGLang says around our reason.
_SGLANGS_WORDS = re.compile(
    r"the request was aborted: .* with exception KVTransferError\(bootstrap_room=\d+\): "
)
#: By then all leases are over, and engines have said so.
HELD_S = TIMES["lease_s"] + 10.0
#: Descriptors that come and go with HTTP connections.
SPARE_FDS = 4
GAUGES = ("offers", "on_offer", "loads", "subscriptions", "posts", "windows", "kv_cache_usage_perc")


class Told(NamedTuple):
    """What a client got. ``client``: the HTTP status and, of an error, its text; "hung" if nothing came."""

    client: str
    token_ids: Sequence[int]
    seconds: float

    @property
    def good(self) -> bool:
        return self.client == "200"


class Found(NamedTuple):
    """What came of a case. ``right``: the client got what it should; ``note``: what else was seen."""

    client: str
    right: bool
    seconds: float
    note: str = ""


@dataclass
class Row:
    """One case on one engine; ``held``: what was still there when all leases were over."""

    case: str
    engine: str
    client: str
    right: bool
    seconds: float
    held: dict[str, float] = field(default_factory=dict)
    note: str = ""


class Servers(Protocol):
    """A prefill and a decode over a proxy, and one that computes everything itself."""

    prefill: Process
    decode: Process
    proxies: Sequence[TcpProxy]

    def settle(self) -> dict[str, float]:
        """What the engines say that they hold, after a step of each."""
        ...


def told(ask: Callable[[], Sequence[int]]) -> Told:
    """Have a client ask, and wait as long as it would."""
    begun = time.monotonic()
    try:
        token_ids = ask()
        return Told("200", token_ids, time.monotonic() - begun)
    except ServerError as error:
        seconds = time.monotonic() - begun
        if seconds > PATIENCE_S - 1:
            return Told("hung", [], seconds)
        answered = re.search(r"answered (\d+): (.*)", str(error), re.DOTALL)
        said = f"{answered[1]}: {answered[2]}" if answered else str(error)
        return Told(re.sub(r"\s+", " ", _SGLANGS_WORDS.sub("aborted: ", said))[:200], [], seconds)


def run(case: str, engine: str, servers: Servers, fault: Callable[[Any], Found]) -> Row:
    """Try one case, see what stays, and clear what it left for the next one."""
    before = _of_the_system(servers)
    files = shared_memory_files()
    try:
        found = fault(servers)
    except (ServerError, AssertionError, OSError) as error:
        found = Found(f"the case could not be run: {error}"[:300], False, 0.0)
    for proxy in servers.proxies:
        proxy.let_go()
    until = time.monotonic() + HELD_S
    while True:
        held = _held(servers, before, files)
        if not held or time.monotonic() > until:
            break
        time.sleep(1.0)
    return Row(case, engine, found.client, found.right, round(found.seconds, 2), held, found.note)


def _of_the_system(servers: Servers) -> dict[str, tuple[int, int]]:
    """Process group and descriptors of each server."""
    both = {"prefill": servers.prefill, "decode": servers.decode}
    return {
        role: (server.popen.pid if server.popen else 0, holdings(server)["fds"])
        for role, server in both.items()
    }


def _held(servers: Servers, before: dict[str, tuple[int, int]], files: set[str]) -> dict[str, float]:
    try:
        left = {name: value for name, value in servers.settle().items() if value}
    except (ServerError, OSError) as error:
        return {f"a server does not answer: {error}"[:200]: 1}
    for role, (group, fds) in _of_the_system(servers).items():
        if group == before[role][0] and fds > before[role][1] + SPARE_FDS:
            left[f"{role}.fds"] = fds - before[role][1]
    if same_group := [role for role, now in _of_the_system(servers).items() if now[0] == before[role][0]]:
        more = shared_memory_files() - files
        if more and len(same_group) == 2:  # a server that was started again has files of its own
            left["/dev/shm"] = len(more)
    return left


def engine_gauges(role: str, server: Process) -> dict[str, float]:
    return {f"{role}.{name}": value for name, value in gauges(server).items() if name in GAUGES}


def hashes_by_side(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Of the audit's records: digests of what each side has of the transfers that ended, sorted."""
    return {
        side: sorted(r["sha256"] for r in records if r["side"] == side) for side in ("producer", "consumer")
    }


class Silent:
    """A peer that takes connections and never says a word."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def close(self) -> None:
        self._listener.close()


@contextmanager
def proxied(count: int) -> Iterator[tuple[int, list[TcpProxy]]]:
    """``count`` ports in a row for an engine's ranks, and as many proxies in a row to them."""
    for _ in range(50):
        first, front = free_port(), free_port()
        proxies: list[TcpProxy] = []
        try:
            for rank in range(count):
                proxies.append(TcpProxy(first + rank, front + rank))
            break
        except OSError:
            for proxy in proxies:
                proxy.close()
    try:
        yield first, proxies
    finally:
        for proxy in proxies:
            proxy.close()
