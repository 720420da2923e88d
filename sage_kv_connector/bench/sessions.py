# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench sessions``: what many open sessions cost two processes while nothing moves, and while one does.

Both processes have one engine. The asking one knows the other under as many ranks as there shall be sessions, so that
it opens one for each. CPU is that of our own threads, by the kernel's count in nanoseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import resource
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from sage_kv_connector.bench.cpu_time import cpu_of_threads
from sage_kv_connector.bench.pair import take_cores
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.console import bytes_text, progress
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.engine import EngineCore, Question, Reply

VERB = "bench.echo"
TIMEOUT_S = 60.0
#: Sessions that are being opened at a time; a listener lets 64 strangers wait.
OPENING = 32
#: Lanes have fallen asleep by then.
SETTLE_S = 1.0
ASKS = 200
#: Descriptors of a session that any backend may need, with lanes, and of everything else beside what is open already.
MOST_DESCRIPTORS, OTHER_DESCRIPTORS = 4, 256


class TooManySessions(ValueError):
    """This process may not open enough descriptors; the message says how many."""


def allow_descriptors(sessions: int) -> None:
    """Raise this process's soft limit. Raises TooManySessions where the hard one is too low."""
    wanted = sessions * MOST_DESCRIPTORS + OTHER_DESCRIPTORS + len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise TooManySessions(
            f"{sessions} sessions need up to {wanted} descriptors in a process, its hard limit is {hard}: raise it "
            "(ulimit -Hn) or ask for fewer --sessions"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _core(backend: str) -> EngineCore:
    core = EngineCore(KVTransportConfig(backend=backend, host="127.0.0.1"))
    core.start()
    return core


def _held() -> dict[str, int]:
    """What this process holds: bytes of its own and shared with its peer, descriptors."""
    rollup = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(value.split()[0]) for name, value in rollup.items()}
    own = kib["Private_Clean"] + kib["Private_Dirty"]
    shared = kib["Pss_Shmem"] if "Pss_Shmem" in kib else kib["Pss"] - own
    return {
        "own_bytes": own << 10,
        "shared_bytes": shared << 10,
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


def thread_cpu_s() -> dict[str, float]:
    """CPU seconds of our own threads in this process: the control thread's and the lanes'."""
    spent = {"control": 0.0, "lanes": 0.0}
    for name, seconds in cpu_of_threads():
        if name.startswith("sage-kvt"):
            spent["control" if name == "sage-kvt-ctl" else "lanes"] += seconds
    return spent


def _answer(pipe: Connection, backend: str, sessions: int) -> None:
    """The other process: answers questions, and says what it holds and spent when it is asked over the pipe."""
    take_cores(1)
    allow_descriptors(sessions)
    core = _core(backend)
    core.serve(VERB, Question.answer)
    pipe.send((core.engine_id, core.addresses))
    while pipe.recv():
        pipe.send((_held(), thread_cpu_s()))
    core.close()


class _Asking:
    """The process that opens the sessions."""

    def __init__(self, pipe: Connection, backend: str) -> None:
        self.core = _core(backend)
        engine_id, addresses = pipe.recv()
        self._peer = PeerAddress(engine_id, 0, addresses)
        self._replies: queue.Queue[Reply] = queue.Queue()

    def open(self, first: int, last: int) -> None:
        """Sessions ``first`` to ``last`` - 1."""
        asked = first
        for answered in range(first, last):
            while asked < min(last, answered + OPENING):
                self._ask(asked)
                asked += 1
            self._answered()

    def ask_us(self) -> float:
        """From a question over one of the sessions to its answer, both sides asleep before."""
        taken = []
        for _ in range(ASKS):
            time.sleep(0.001)
            begun = time.perf_counter()
            self._ask(0)
            self._answered()
            taken.append((time.perf_counter() - begun) * 1e6)
        return median(taken)

    def _ask(self, rank: int) -> None:
        self.core.ask(self._peer._replace(rank=rank), VERB, b"", self._replies.put, TIMEOUT_S)

    def _answered(self) -> None:
        reply = self._replies.get(timeout=TIMEOUT_S)
        if not reply.ok:
            raise RuntimeError(f"a session can't be opened: {reply.code}, {reply.detail}")


def _measure(backend: str, sessions: int, seconds: float) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipe, peer = context.Pipe()
    process = context.Process(target=_answer, args=(peer, backend, sessions), daemon=True)
    process.start()
    asking = _Asking(pipe, backend)

    def both() -> tuple[tuple[dict[str, int], dict[str, float]], ...]:
        pipe.send(True)
        theirs = pipe.recv()
        return (_held(), thread_cpu_s()), theirs

    try:
        asking.open(0, 1)
        one_us = asking.ask_us()
        before = both()
        begun = time.monotonic()
        asking.open(1, sessions)
        opened_s = time.monotonic() - begun
        many_us = asking.ask_us()
        time.sleep(SETTLE_S)
        at_rest = both()
        time.sleep(seconds)
        after = both()
        open_now = asking.core.counters()["sessions"]
    finally:
        asking.core.close()
        pipe.send(False)
        process.join(10)
    row: dict[str, Any] = {"backend": backend, "sessions": open_now, "open_s": opened_s}
    for number, side in enumerate(("asking", "answering")):
        held = {name: at_rest[number][0][name] - before[number][0][name] for name in at_rest[number][0]}
        spent = {name: after[number][1][name] - at_rest[number][1][name] for name in after[number][1]}
        row[side] = {
            **{name: value / max(1, sessions - 1) for name, value in held.items()},
            **{f"{name}_percent": 100 * value / seconds for name, value in spent.items()},
        }
    return {**row, "ask_us_of_one": one_us, "ask_us": many_us}


def bench_sessions(backends: list[str], sessions: int, seconds: float) -> dict[str, Any]:
    """``rows``: of each backend what a session holds on either side, and what all of them spend in % of a core.

    ``ask_us``: a question and its answer over one of them, all others idle; ``ask_us_of_one``: where there is no other.
    Raises TooManySessions.
    """
    allow_descriptors(sessions)
    take_cores(0)
    rows = []
    for backend in backends:
        progress.print(f"{sessions} sessions over {backend}; then {seconds:.0f} s of rest")
        rows.append(_measure(backend, sessions, seconds))
    return {"rows": rows, "seconds": seconds}


def sessions_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    for row in result["rows"]:
        name = f"{row['backend']}, {row['sessions']} sessions"
        yield f"{name}, opened in", f"{row['open_s']:.2f} s"
        for side in ("asking", "answering"):
            one = row[side]
            yield (
                f"{name}, {side} side",
                f"idle: control thread {one['control_percent']:.3f} %, lanes {one['lanes_percent']:.3f} % of a core; "
                f"a session: {bytes_text(one['own_bytes'])} of its own, {bytes_text(one['shared_bytes'])} shared, "
                f"{one['descriptors']:.1f} descriptors",
            )
        yield (
            f"{name}, a question and its answer",
            f"{row['ask_us']:.0f} µs; {row['ask_us_of_one']:.0f} µs where the session is the only one",
        )
