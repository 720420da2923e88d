# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench telemetry``: what counting and timing cost, with telemetry and without in turns.

A transfer: two pairs of processes, whose lanes take times or not, move the same blocks. A hand-over: two pairs of
engines, with telemetry and without; from decode's question to its answer. One with spans: both pairs with
telemetry, one sends spans to a collector in another process. Each round does both, the one that
goes first takes turns. All of it is done twice, and the pair that is made first is the other one then; the cost is the
geometric mean of the two medians of the rounds' ratios, less 1. It is said of wall time and of both sides' CPU time:
where they share the cores with what moves the bytes, as on loopback, wall time says who was scheduled when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count
from statistics import geometric_mean, median
from typing import Any, NamedTuple

from sage_kv_connector.bench.contender import Contender
from sage_kv_connector.bench.control import PAGE, Handover, Side
from sage_kv_connector.bench.discarding_collector import DiscardingCollector
from sage_kv_connector.console import bytes_text, progress

WARM_UP = 2
LAYERS, DIM = 32, 512
ORDERS = ((True, False), (False, True))


class Taken(NamedTuple):
    """Seconds."""

    wall: float
    cpu: float


Round = tuple[Taken, Taken]


def _interleaved(rounds: int, seconds: Callable[[bool], Taken]) -> list[Round]:
    """Of each round: what it took with, and without."""
    found = []
    for number in range(WARM_UP + rounds):
        order = (True, False) if number % 2 else (False, True)
        taken = {on: seconds(on) for on in order}
        found.append((taken[True], taken[False]))
    return found[WARM_UP:]


def _figures(halves: Sequence[list[Round]]) -> dict[str, Any]:
    """``halves``: the same twice, made in the other order: where memory lies says more than telemetry does."""
    overhead, quartiles = _overhead([[on.wall / off.wall for on, off in rounds] for rounds in halves])
    cpu_overhead, cpu_quartiles = _overhead([[on.cpu / off.cpu for on, off in rounds] for rounds in halves])
    return {
        "with_s": median(on.wall for rounds in halves for on, _ in rounds),
        "without_s": median(off.wall for rounds in halves for _, off in rounds),
        "overhead": overhead,
        "quartiles": quartiles,
        "cpu_overhead": cpu_overhead,
        "cpu_quartiles": cpu_quartiles,
    }


def _overhead(halves: Sequence[list[float]]) -> tuple[float, list[float]]:
    """Of the rounds' ratios: the median and the quartiles, less 1."""
    ratios = [sorted(half) for half in halves]
    quarter = len(ratios[0]) // 4
    quartiles = [geometric_mean(half[at] for half in ratios) - 1 for at in (quarter, -1 - quarter)]
    return geometric_mean(median(half) for half in ratios) - 1, quartiles


def _transfer(backend: str, block: int, total: int, rounds: int) -> dict[str, Any]:
    sizes = (backend, str(block), str(total), "none")
    halves, right = [], True
    for order in ORDERS:
        with ExitStack() as stack:
            pairs: dict[bool, Contender] = {}
            for on in order:
                pairs[on] = Contender(
                    "sage_kv_connector.bench.pair", (*sizes, *(() if on else ("unmeasured",)))
                )
                stack.callback(pairs[on].close)

            def seconds(on: bool, pairs: dict[bool, Contender] = pairs) -> Taken:
                said = pairs[on].ask("run")
                return Taken(total / float(said["gbytes_per_s"]) / 1e9, float(said["cpu_s"]))

            halves.append(_interleaved(rounds, seconds))
            right = right and all(bool(pair.ask("verify")["verified"]) for pair in pairs.values())
    about = {"what": "transfer", "backend": backend, "block_bytes": block, "bytes": total}
    return {**about, "right": right, **_figures(halves)}


def _handover(
    what: str, backend: str, tokens: int, rounds: int, options: Callable[[bool], dict[str, Any]]
) -> dict[str, Any]:
    """``options``: of the engines with what is measured, and without."""
    halves, right, nbytes = [], True, 0
    for order in ORDERS:
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

            halves.append(_interleaved(rounds, seconds))
            right = right and all(decode.filled_with(1) for _, decode in sides.values())
            nbytes = int(sides[True][1].wanted("t", finished=True).target.nbytes)
    about = {"what": what, "backend": backend, "tokens": tokens, "bytes": nbytes}
    return {**about, "right": right, **_figures(halves)}


def _telemetry(on: bool) -> dict[str, Any]:
    return {"telemetry": on}


def _spans(endpoint: str, on: bool) -> dict[str, Any]:
    return {"otlp_endpoint": endpoint} if on else {}


def bench_telemetry(
    backends: list[str], blocks: list[int], total: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """``rows``: overhead as a share of the time without; ``worst`` and ``worst_cpu``: the largest of them."""
    rows = []
    for backend in backends:
        for block in blocks:
            progress.print(
                f"{backend}: {bytes_text(total)} in blocks of {bytes_text(block)}, {rounds} rounds"
            )
            rows.append(_transfer(backend, block, total, rounds))
        progress.print(f"{backend}: hand-overs of {tokens} tokens, {rounds} rounds")
        rows.append(_handover("hand-over", backend, tokens, rounds, _telemetry))
        with DiscardingCollector() as collector:
            rows.append(
                _handover(
                    "hand-over with spans", backend, tokens, rounds, partial(_spans, collector.endpoint)
                )
            )
            rows[-1]["right"] = rows[-1]["right"] and collector.requests() > 0
    return {
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
        low, high = row["quartiles"]
        yield (
            f"{row['backend']}, {what}",
            f"{row['overhead']:+.2%} (quartiles {low:+.2%} to {high:+.2%}), {row['with_s'] * 1e3:.1f} ms; "
            f"CPU time {row['cpu_overhead']:+.2%}",
        )
    yield "worst", f"{result['worst']:+.2%}, CPU time {result['worst_cpu']:+.2%}"
