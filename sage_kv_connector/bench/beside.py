# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench beside``: what transfers take from a thread that runs Python all the time beside them.

The thread stands for an engine's worker that launches a model's kernels. It counts as fast as it can, and reports each
layer of what it hands over, as a worker does. Decode is another process. Rounds with and without hand-overs take
turns; the ratio is of iterations a second, a median over rounds.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from sage_kv_connector.bench.control import PAGE, TIMEOUT_S, Side
from sage_kv_connector.bench.pair import take_cores
from sage_kv_connector.console import progress
from sage_kv_connector.contract.peer import PeerAddress
from sage_kv_connector.contract.plan import Outcome
from sage_kv_connector.engine import PagedSource, Step

ROUND_S = 2.0
#: Iterations between two looks at the clock.
CHUNK = 2000


def _decode(pipe: Connection, backend: str, layers: int, tokens: int) -> None:
    """The other process: fetches each transfer whose name it is told, and says in the end what went wrong."""
    take_cores(1)
    side = Side(backend, layers, tokens, PAGE, 2)
    engine_id, addresses = pipe.recv()
    peer = PeerAddress(engine_id, 0, addresses)
    ended: queue.Queue[Outcome] = queue.Queue()
    asked = 0
    while (name := pipe.recv()) is not None:
        asked += 1
        side.core.subscribe(peer, side.wanted(name, finished=False), ended.put)
    errors = [error for _ in range(asked) if (error := ended.get(timeout=TIMEOUT_S).error)]
    pipe.send(errors or ([] if side.filled_with(1) else ["other bytes than prefill's"]))
    side.core.close()


class _Prefill:
    """The process that is measured."""

    def __init__(self, pipe: Connection, backend: str, layers: int, tokens: int) -> None:
        self._pipe = pipe
        self._layers = layers
        self.side = Side(backend, layers, tokens, PAGE, 1)
        self._released: queue.Queue[Outcome] = queue.Queue()
        self._under_way: list[tuple[str, Step, int]] = []  # name, its step, layers that are final
        self._names = 0
        pipe.send((self.side.core.engine_id, self.side.core.addresses))

    def round(self, seconds: float, a_second: float) -> float:
        """Iterations a second, with so many hand-overs begun in each; what is under way then is ended first."""
        begun = time.monotonic()
        end, count = begun + seconds, 0
        every = 1 / a_second if a_second else float("inf")
        next_one, next_layer = begun, begun
        layer_s = every / self._layers / 2 if a_second else float("inf")
        while (now := time.monotonic()) < end:
            if now >= next_one:
                self._offer()
                next_one += every
            if now >= next_layer:
                self._layer()
                next_layer = now + layer_s
            for _ in range(CHUNK):
                count += 1
        taken = time.monotonic() - begun
        while self._under_way:
            self._layer()
        while self.side.core.counters()["offers"]:
            time.sleep(0.001)
        return count / taken

    def _offer(self) -> None:
        self._names += 1
        name, source = f"t{self._names}", PagedSource(self.side.view)
        self.side.core.offer(name, source, self._released.put)
        self._pipe.send(name)
        self._under_way.append((name, self.side.begin_step(source), 0))

    def _layer(self) -> None:
        """The next layer of each prefill under way is final."""
        left = []
        for name, step, layer in self._under_way:
            step.layer(0, layer)
            self.side.core.advanced(name)
            if layer + 1 < self._layers:
                left.append((name, step, layer + 1))
            else:
                self.side.core.finish(name)
        self._under_way = left

    def close(self) -> tuple[int, list[str]]:
        """How many were handed over, and what went wrong."""
        self._pipe.send(None)
        errors: list[str] = self._pipe.recv()
        self.side.core.close()
        return self._names, errors


def bench_beside(backend: str, layers: int, tokens: int, a_second: float, rounds: int) -> dict[str, Any]:
    """``ratio``: iterations a second with ``a_second`` streamed hand-overs a second, over those with none."""
    context = multiprocessing.get_context("spawn")
    pipe, peer = context.Pipe()
    process = context.Process(target=_decode, args=(peer, backend, layers, tokens), daemon=True)
    process.start()
    take_cores(0)
    prefill = _Prefill(pipe, backend, layers, tokens)
    ratios, alone = [], []
    for number in range(rounds + 1):
        progress.print(f"round {number} of {rounds}: {a_second:g} hand-overs a second, and none")
        order = (a_second, 0.0) if number % 2 else (0.0, a_second)
        figures = {rate: prefill.round(ROUND_S, rate) for rate in order}
        if number:  # the first warms up
            ratios.append(figures[a_second] / figures[0.0])
            alone.append(figures[0.0])
    handed_over, errors = prefill.close()
    for error in sorted(set(errors)):
        progress.print(f"beside: {error}")
    process.join(10)
    return {
        "backend": backend,
        "layers": layers,
        "tokens": tokens,
        "a_second": a_second,
        "iterations_per_s": median(alone),
        "ratio": median(ratios),
        "handed_over": handed_over,
        "right": not errors,
    }


def beside_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "iterations a second, no transfers", f"{result['iterations_per_s']:.3g}"
    yield (
        f"with {result['a_second']:g} streamed hand-overs a second over {result['backend']}",
        f"{result['ratio']:.4f} of it" + ("" if result["right"] else ", WRONG"),
    )
