# SPDX-License-Identifier: Apache-2.0
"""What a load takes of the machine: CPU seconds by part, memory, bytes on the link."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from sage_kv_connector.bench.ab.links import Hosts
from sage_kv_connector.bench.cpu_time import cpu_of_threads
from sage_kv_connector.bench.server_pairs import ServerPair
from sage_kv_connector.launch.process import Process

SAMPLE_S = 0.5
IDLE = 0.1
#: How our threads' names begin, as the kernel cuts them. Peers' threads have no names: theirs are the engine's.
PARTS = {"sage-kvt-conv": "conversion", "sage-kvt": "transport"}


@dataclass
class Spent:
    """``cpu_s``: by role and part. ``memory_bytes``: the most that both servers held at once, without files.

    ``busy_bytes`` of ``wire_bytes`` crossed the link in the ``busy_s`` in which it surely carried KV.
    """

    cpu_s: dict[str, dict[str, float]] = field(default_factory=dict)
    memory_bytes: int = 0
    wire_bytes: int | None = None
    busy_bytes: int = 0
    busy_s: float = 0.0


@contextmanager
def spent(pair: ServerPair, hosts: Hosts | None) -> Iterator[Spent]:
    """Filled in at its end."""
    found = Spent()
    ended = threading.Event()
    roles = {"prefill": pair.prefill, "decode": pair.decode}

    sent: list[tuple[float, int]] = []

    def watch() -> None:
        while True:
            found.memory_bytes = max(found.memory_bytes, sum(map(memory_bytes, roles.values())))
            if hosts:
                sent.append((time.monotonic(), hosts.sent_bytes()))
            if ended.wait(SAMPLE_S):
                return

    before = {role: _cpu_s(server) for role, server in roles.items()}
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        after = {role: _cpu_s(server) for role, server in roles.items()}
        found.cpu_s = {role: dict(after[role] - before[role]) for role in roles}
        if hosts:
            sent.append((time.monotonic(), hosts.sent_bytes()))
            found.wire_bytes = sent[-1][1] - sent[0][1]
            found.busy_bytes, found.busy_s = busy(sent)


def busy(sent: Sequence[tuple[float, int]]) -> tuple[int, float]:
    """Bytes and seconds in which a link carried something all the time. ``sent``: when, and bytes so far.

    A sample's interval counts if it and both beside it carried more than ``IDLE`` of the fullest one: in one that has
    an idle neighbour something may have begun or ended.
    """
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(sent)]
    rates = [moved / seconds if seconds else 0.0 for seconds, moved in steps]
    carries = [rate > IDLE * max(rates) for rate in rates]
    inner = [steps[i] for i in range(1, len(steps) - 1) if all(carries[i - 1 : i + 2])]
    return sum(moved for _, moved in inner), sum(seconds for seconds, _ in inner)


def _cpu_s(server: Process) -> Counter[str]:
    """Seconds by part; threads that have ended meanwhile are not among them."""
    seconds: Counter[str] = Counter()
    for pid in server.pids():
        with contextlib.suppress(OSError):
            for name, cpu_s in cpu_of_threads(pid):
                part = next((PARTS[start] for start in PARTS if name.startswith(start)), "engine")
                seconds[part] += cpu_s  # type: ignore[assignment]
    return seconds


def memory_bytes(server: Process) -> int:
    """That all its processes hold now, without what files back."""
    total = 0
    for pid in server.pids():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += (
                sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.M)) * 1024
            )
    return total


def descriptors(server: Process) -> int:
    """Open in all its processes."""
    total = 0
    for pid in server.pids():
        with contextlib.suppress(OSError):
            total += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return total
