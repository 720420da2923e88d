# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench rate``: hand-overs that arrive at a fixed rate between two processes with a core each.

Arrivals are open: they don't wait for those before them, so a rate that is too high shows as a latency that grows.
Modes: ``whole`` (prefill of a request is over when it arrives, decode asks then) and ``streamed`` (decode asks at once;
a step of prefill takes all that arrived since the step before, and its layers become final one after the other).
Latency is from "all of it is final" to the end at decode. CPU is that of each thread alone: the control thread, and
what the engine's own thread spends in our calls; lanes are shown beside, since they never need the interpreter.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sage_kv_connector.bench.control import HEADS, ITEM, LAYER_S, PAGE, TIMEOUT_S, Side
from sage_kv_connector.bench.pair import take_cores
from sage_kv_connector.bench.sessions import thread_cpu_s
from sage_kv_connector.console import bytes_text, progress
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import PagedSource, Step

MODES = ("whole", "streamed")
WARM_UP = 20
#: So small that what is measured is how many pages there are.
DIM = 2
PAGE_BYTES = HEADS * PAGE * 2 * DIM * ITEM
#: A latency of the last fifth that is so much of the first one's grows.
GROWS = 2.0


class _Clock:
    """CPU of a process since ``begin``, by thread; the engine's own thread counts what it gives to ``timed``."""

    def __init__(self) -> None:
        self._engine_s = 0.0
        self._before = thread_cpu_s()

    def begin(self) -> None:
        self._engine_s, self._before = 0.0, thread_cpu_s()

    def timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.thread_time()
        try:
            return function(*arguments)
        finally:
            self._engine_s += time.thread_time() - begun

    def spent_s(self) -> dict[str, float]:
        now = thread_cpu_s()
        return {"engine": self._engine_s, **{name: now[name] - self._before[name] for name in now}}


def _decode(pipe: Connection, backend: str, layers: int, tokens: int) -> None:
    """The other process: fetches what it is told of; after None it says what ended when, went wrong, and was spent."""
    take_cores(1)
    side = Side(backend, layers, tokens, PAGE, 2, DIM)
    engine_id, addresses = pipe.recv()
    peer = PeerAddress(engine_id, 0, addresses)
    ended_ns: dict[str, int] = {}
    errors: list[str] = []
    clock = _Clock()
    asked = 0

    def on_outcome(name: str, outcome: Outcome) -> None:
        ended_ns[name] = time.monotonic_ns()
        if outcome.error:
            errors.append(outcome.error)

    while (order := pipe.recv()) is not None:
        if order == "begin":
            clock.begin()
            continue
        name, finished = order
        asked += 1
        wanted = side.wanted(name, finished=finished)
        clock.timed(side.core.subscribe, peer, wanted, partial(on_outcome, name))
    until = time.monotonic() + TIMEOUT_S
    while len(ended_ns) < asked and time.monotonic() < until:
        time.sleep(0.001)
    spent = clock.spent_s()
    if not side.filled_with(1):
        errors.append("other bytes than prefill's")
    pipe.send((dict(ended_ns), asked, errors, spent))
    side.core.close()


class _Prefill:
    """The process where requests arrive."""

    def __init__(self, pipe: Connection, mode: str, backend: str, layers: int, tokens: int) -> None:
        self._pipe, self._streamed, self._layers = pipe, mode == "streamed", layers
        self.side = Side(backend, layers, tokens, PAGE, 1, DIM)
        pipe.send((self.side.core.engine_id, self.side.core.addresses))
        self.final_ns: dict[str, int] = {}
        self.clock = _Clock()

    def run(self, count: int, a_second: float) -> float:
        """``count`` arrivals; returns how long that took, in seconds, with the end of the last one."""
        self.clock.begin()
        self._pipe.send("begin")
        first, begun, number = len(self.final_ns), time.monotonic(), 0
        while number < count:
            due = int((time.monotonic() - begun) * a_second) + 1
            names = [f"t{first + i}" for i in range(number, min(due, count))]
            number += len(names)
            if names:
                self._step(names)
            elif (wait := begun + number / a_second - time.monotonic()) > 0:
                time.sleep(wait)
        until = time.monotonic() + TIMEOUT_S
        while self.side.core.counters()["offers"] and time.monotonic() < until:
            time.sleep(0.001)
        return time.monotonic() - begun

    def _step(self, names: Sequence[str]) -> None:
        """A step that computes the whole prompts of these requests."""
        step = self.clock.timed(self._begin, names)
        if self._streamed:
            self._tell(names, finished=False)
            for layer in range(self._layers):
                time.sleep(LAYER_S)
                self.clock.timed(self._layer, names, step, layer)
        now = time.monotonic_ns()
        self.clock.timed(self._end, names, step)
        self.final_ns.update(dict.fromkeys(names, now))
        if not self._streamed:
            self._tell(names, finished=True)

    def _tell(self, names: Sequence[str], *, finished: bool) -> None:
        for name in names:
            self._pipe.send((name, finished))

    def _begin(self, names: Sequence[str]) -> Step:
        sources = [PagedSource(self.side.view) for _ in names]
        for name, source in zip(names, sources, strict=True):
            self.side.core.offer(name, source, lambda _: None)
        return self.side.begin_step(*sources)

    def _layer(self, names: Sequence[str], step: Step, layer: int) -> None:
        step.layer(0, layer)
        self._advanced(names)

    def _end(self, names: Sequence[str], step: Step) -> None:
        step.all()
        self._advanced(names)
        for name in names:
            self.side.core.finish(name)

    def _advanced(self, names: Sequence[str]) -> None:
        for name in names:
            self.side.core.advanced(name)


def _measure(
    mode: str, backend: str, layers: int, tokens: int, a_second: float, seconds: float
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipe, peer = context.Pipe()
    process = context.Process(target=_decode, args=(peer, backend, layers, tokens), daemon=True)
    process.start()
    prefill = _Prefill(pipe, mode, backend, layers, tokens)
    try:
        prefill.run(WARM_UP, a_second)
        taken = prefill.run(round(a_second * seconds), a_second)
        spent = prefill.clock.spent_s()
        pipe.send(None)
        ended_ns, asked, errors, their_spent = pipe.recv()
    finally:
        prefill.side.core.close()
        process.join(10)
    for error in sorted(set(errors)):
        progress.print(f"rate: {error}", markup=False)
    latencies = [(ended_ns[name] - ns) / 1e6 for name, ns in prefill.final_ns.items() if name in ended_ns]
    fifths = np.array_split(latencies[WARM_UP:], 5)
    first, last = (
        {f"p{q}_ms": float(np.percentile(f, q)) for q in (50, 99)} for f in (fifths[0], fifths[-1])
    )
    ended = len(latencies) == asked and not errors
    return {
        "mode": mode,
        "backend": backend,
        "asked": asked,
        "a_second": (asked - WARM_UP) / taken,
        "first_fifth": first,
        "last_fifth": last,
        "sustained": ended
        and last["p50_ms"] < GROWS * first["p50_ms"] + 1.0
        and taken < seconds * 1.05 + 1.0,
        "right": ended,
        "prefill": {name: 100 * value / taken for name, value in spent.items()},
        "decode": {name: 100 * value / taken for name, value in their_spent.items()},
    }


def bench_rate(
    backends: list[str], modes: list[str], layers: int, tokens: int, a_second: float, seconds: float
) -> dict[str, Any]:
    """``rows``: of each mode and backend whether the rate was sustained, latencies in ms, CPU in % of a core."""
    take_cores(0)
    rows = []
    for backend in backends:
        for mode in modes:
            progress.print(f"{mode} over {backend}: {a_second:g} a second for {seconds:g} s")
            rows.append(_measure(mode, backend, layers, tokens, a_second, seconds))
    return {
        "rows": rows,
        "a_second": a_second,
        "seconds": seconds,
        "layers": layers,
        "tokens": tokens,
        "page_bytes": PAGE_BYTES,
    }


def rate_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    pages = result["layers"] * -(-result["tokens"] // PAGE)
    yield (
        "a hand-over",
        f"{result['layers']} layers, {result['tokens']} tokens: {pages} pages of {result['page_bytes']} B, "
        f"{bytes_text(pages * result['page_bytes'])}",
    )
    for row in result["rows"]:
        name = f"{row['mode']}, {row['backend']}"
        first, last = row["first_fifth"], row["last_fifth"]
        yield (
            f"{name}, {row['a_second']:.0f} a second",
            f"{'sustained' if row['sustained'] else 'NOT SUSTAINED'}{'' if row['right'] else ', WRONG'}; p50 (p99) "
            f"{first['p50_ms']:.2f} ({first['p99_ms']:.2f}) ms in the first fifth, {last['p50_ms']:.2f} "
            f"({last['p99_ms']:.2f}) ms in the last",
        )
        for side in ("prefill", "decode"):
            spent = row[side]
            yield (
                f"{name}, {side}'s interpreter",
                f"{spent['control'] + spent['engine']:.1f} % of a core: control thread {spent['control']:.1f} %, "
                f"engine's thread {spent['engine']:.1f} %; lanes {spent['lanes']:.1f} %",
            )
