# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench telemetry``: what counting and timing cost, with telemetry and without in turns.

A transfer: two pairs of processes, whose lanes take times or not, move the same blocks. A hand-over: two pairs of
engines, with telemetry and without; from decode's question to its answer. One with spans: both pairs with
telemetry, one sends spans to a collector in another process. Each round does both, the one that
goes first takes turns. All of it is done several times with pairs that are made anew, the other one first: where their
memory lies says more than telemetry does. The cost is the geometric mean of the medians of the rounds' ratios, less 1;
95 of 100 resamples of pairs, and of the rounds of each, lie within its interval. It is said of wall time and of both
sides' CPU time: where they share the cores with what moves the bytes, as on loopback, wall time says who was scheduled
when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count, cycle, islice
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sage_kv_connector.bench.contender import Contender
from sage_kv_connector.bench.control import PAGE, Handover, Side
from sage_kv_connector.bench.discarding_collector import DiscardingCollector
from sage_kv_connector.bench.interval import interval
from sage_kv_connector.console import bytes_text, progress

WARM_UP = 2
LAYERS, DIM = 32, 512
RESAMPLES = 2000


class Taken(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


Round = tuple[Taken, Taken]


def _interleaved(rounds: int, seconds: Callable[[bool], Taken]) -> list[Round]:
    """Of each round: what it took with, and without."""
    found = []
    for order in _orders(WARM_UP + rounds):
        taken = {on: seconds(on) for on in order}
        found.append((taken[True], taken[False]))
    return found[WARM_UP:]


def _figures(pairs: Sequence[list[Round]]) -> dict[str, Any]:
    """``pairs``: the rounds of each."""
    overhead, spread = _overhead([[on.wall / off.wall for on, off in rounds] for rounds in pairs])
    cpu_overhead, cpu_spread = _overhead([[on.cpu / off.cpu for on, off in rounds] for rounds in pairs])
    return {
        "with_s": median(on.wall for rounds in pairs for on, _ in rounds),
        "without_s": median(off.wall for rounds in pairs for _, off in rounds),
        "overhead": overhead,
        "interval": spread,
        "cpu_overhead": cpu_overhead,
        "cpu_interval": cpu_spread,
    }


def _overhead(pairs: Sequence[list[float]]) -> tuple[float, list[float]]:
    """Of the rounds' ratios, and the interval of it."""
    ratios = np.array(pairs)
    drawn = np.random.default_rng(0)
    of_pairs, of_rounds = ratios.shape
    again = [
        _cost(drawn.choice(rounds, of_rounds) for rounds in drawn.choice(ratios, of_pairs))
        for _ in range(RESAMPLES)
    ]
    return _cost(ratios), interval(again)


def _cost(pairs: Iterable[NDArray[np.float64]]) -> float:
    return float(np.exp(np.mean([np.log(np.median(rounds)) for rounds in pairs]))) - 1


def _orders(times: int) -> Iterator[tuple[bool, bool]]:
    """Which comes first each time, with telemetry or without: they take turns."""
    return islice(cycle(((True, False), (False, True))), times)


def _transfer(backend: str, block: int, total: int, pairs: int, rounds: int) -> dict[str, Any]:
    sizes = (backend, str(block), str(total), "none")
    found, right = [], True
    for order in _orders(pairs):
        with ExitStack() as stack:
            made: dict[bool, Contender] = {}
            for on in order:
                made[on] = Contender(
                    "sage_kv_connector.bench.pair", (*sizes, *(() if on else ("unmeasured",)))
                )
                stack.callback(made[on].close)

            def seconds(on: bool, made: dict[bool, Contender] = made) -> Taken:
                said = made[on].ask("run")
                return Taken(total / float(said["gbytes_per_s"]) / 1e9, float(said["cpu_s"]))

            found.append(_interleaved(rounds, seconds))
            right = right and all(bool(pair.ask("verify")["verified"]) for pair in made.values())
    about = {"what": "transfer", "backend": backend, "block_bytes": block, "bytes": total}
    return {**about, "right": right, **_figures(found)}


def _handover(
    what: str, backend: str, tokens: int, pairs: int, rounds: int, options: Callable[[bool], dict[str, Any]]
) -> dict[str, Any]:
    """``options``: of the engines with what is measured, and without."""
    found, right, nbytes = [], True, 0
    for order in _orders(pairs):
        with ExitStack() as stack:
            sides: dict[bool, tuple[Side, Side]] = {}
            for on in order:
                made = [Side(backend, LAYERS, tokens, PAGE, seed, DIM, **options(on)) for seed in (1, 2)]
                sides[on] = (made[0], made[1])
                for side in made:
                    stack.callback(side.core.close)
            names = count()

            def seconds(
                on: bool, sides: dict[bool, tuple[Side, Side]] = sides, names: Iterator[int] = names
            ) -> Taken:
                handover = Handover(*sides[on], f"t{next(names)}")
                begun, spent = time.perf_counter(), time.process_time()
                handover.run("whole")
                return Taken(time.perf_counter() - begun, time.process_time() - spent)

            found.append(_interleaved(rounds, seconds))
            right = right and all(decode.filled_with(1) for _, decode in sides.values())
            nbytes = int(sides[True][1].wanted("t", finished=True).target.nbytes)
    about = {"what": what, "backend": backend, "tokens": tokens, "bytes": nbytes}
    return {**about, "right": right, **_figures(found)}


def _telemetry(on: bool) -> dict[str, Any]:
    return {"telemetry": on}


def _spans(endpoint: str, on: bool) -> dict[str, Any]:
    return {"otlp_endpoint": endpoint} if on else {}


def bench_telemetry(
    backends: list[str], blocks: list[int], total: int, tokens: int, pairs: int, rounds: int
) -> dict[str, Any]:
    """``rows``: overhead as a share of the time without; ``worst`` and ``worst_cpu``: the largest of them."""
    rows = []
    times = f"{pairs} times {rounds} rounds"
    for backend in backends:
        for block in blocks:
            progress.print(f"{backend}: {bytes_text(total)} in blocks of {bytes_text(block)}, {times}")
            rows.append(_transfer(backend, block, total, pairs, rounds))
        progress.print(f"{backend}: hand-overs of {tokens} tokens, {times}")
        rows.append(_handover("hand-over", backend, tokens, pairs, rounds, _telemetry))
        with DiscardingCollector() as collector:
            rows.append(
                _handover(
                    "hand-over with spans",
                    backend,
                    tokens,
                    pairs,
                    rounds,
                    partial(_spans, collector.endpoint),
                )
            )
            rows[-1]["right"] = rows[-1]["right"] and collector.requests() > 0
    return {
        "pairs": pairs,
        "rounds": rounds,
        "rows": rows,
        "worst": max(row["overhead"] for row in rows),
        "worst_cpu": max(row["cpu_overhead"] for row in rows),
    }


def telemetry_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for row in result["rows"]:
        what = (
            f"{bytes_text(row['bytes'])} in {bytes_text(row['block_bytes'])}"
            if row["what"] == "transfer"
            else f"{row['what']}, {row['tokens']} tokens"
        )
        low, high = row["interval"]
        cpu_low, cpu_high = row["cpu_interval"]
        yield (
            f"{row['backend']}, {what}",
            f"{row['overhead']:+.2%} ({low:+.2%} to {high:+.2%}), {row['with_s'] * 1e3:.1f} ms; "
            f"CPU time {row['cpu_overhead']:+.2%} ({cpu_low:+.2%} to {cpu_high:+.2%})",
        )
    yield "worst", f"{result['worst']:+.2%}, CPU time {result['worst_cpu']:+.2%}"
