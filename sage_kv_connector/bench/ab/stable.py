# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench stable``: one arm for hours at a share of its saturation; whether time, memory or descriptors grow.

Saturation is what a closed loop of four gets at the beginning. Then requests arrive by Poisson. Each minute is a row;
a slope is that of a line through the rows, its interval from rows drawn anew. The first tenth of the time is left out
of slopes: caches fill meanwhile. Beside the servers the machine itself is watched, by the CPU time of a fixed piece of
work: where that rises, times rise with it.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from sage_kv_connector.bench.ab.arms import ARMS, started
from sage_kv_connector.bench.ab.drive import ANSWER_TOKENS, Done, drive, judge, wrong_answers
from sage_kv_connector.bench.ab.links import linked
from sage_kv_connector.bench.ab.loads import made
from sage_kv_connector.bench.ab.rounds import SHAPE
from sage_kv_connector.bench.ab.spent import descriptors, memory_bytes
from sage_kv_connector.bench.interval import interval
from sage_kv_connector.bench.server_pairs import ServerPair, servers_env, with_baselines
from sage_kv_connector.console import progress
from sage_kv_connector.launch.process import ServerError
from sage_kv_connector.launch.tiny_model import build
from sage_kv_connector.launch.vllm import VllmOptions

SATURATING, SATURATING_REQUESTS = "closed-4", 12
#: Requests that may be on the way at once; more means that it does not keep up.
MOST_AT_ONCE = 64
#: One of so many answers is judged.
JUDGED_EACH = 20
ROW_S = 60.0
SETTLING = 0.1
RESAMPLES = 1000
#: What slopes are of.
WATCHED = "ttft_p50_s", "ttft_p99_s", "memory_bytes", "descriptors", "machine_s"
FIXED_WORK = bytes(2**23)

Row = dict[str, Any]


def bench_stable(
    arm: str, link: str, tokens: int, seconds: float, *, share: float = 0.8, kv_gib: int = 4, seed: str = "0"
) -> dict[str, Any]:
    """``rows``: by minute; ``slopes``: by hour, of what is watched; ``failed`` and ``wrong`` of ``requests``.

    Raises ServerError, LinkError.
    """
    with_baselines()
    with (
        linked(link) as hosts,
        tempfile.TemporaryDirectory(prefix="sage-kvt-stable-") as name,
        ExitStack() as stack,
    ):
        folder = Path(name)
        options = VllmOptions(build(folder, SHAPE), folder, tokens + 256, kv_gib, env=servers_env())
        pair = started(arm, options, hosts, stack)
        saturation = _saturation(pair, tokens, seed)
        progress.print(
            f"{arm} saturates at {saturation:.2f} requests a second; {share:.0%} of it from now on"
        )
        done, held = _arrivals(pair, tokens, saturation * share, seconds, seed)
    rows = list(_rows(done, held))
    return {
        "arm": arm,
        "link": link,
        "tokens": tokens,
        "seconds": seconds,
        "saturation_requests_s": saturation,
        "share": share,
        "requests": len(done),
        "failed": sum("error" in one for one in done),
        "judged": sum("equal" in one for one in done),
        "wrong": wrong_answers(done, lossless=ARMS[arm].lossless),
        # Of each answer that differs: the share of its tokens that don't, and how sure one server is of its own.
        "different": [(one["equal"], one["margin"]) for one in done if one.get("equal", 1) < 1],
        "rows": rows,
        "slopes": slopes(rows),
    }


def _saturation(pair: ServerPair, tokens: int, seed: str) -> float:
    """Requests a second. The first ones warm up."""
    for phase in ("warm-up", "saturation"):
        done = drive(
            pair, made(SATURATING, tokens, SATURATING_REQUESTS, f"{seed} {phase}", None), "sequential"
        )
    failed = [one["error"] for one in done if "error" in one]
    if failed:
        raise ServerError(f"{len(failed)} of {len(done)} requests failed at the beginning: {failed[0]}")
    return float(len(done) / max(one["ended_s"] for one in done))


def _arrivals(
    pair: ServerPair, tokens: int, a_second: float, seconds: float, seed: str
) -> tuple[list[Done], list[Row]]:
    """Each request, and what both servers held every ten seconds."""
    source = random.Random(f"{seed} arrivals")
    begun, ended = time.monotonic(), threading.Event()
    held: list[Row] = []
    told = begun

    def watch() -> None:
        servers = pair.prefill, pair.decode
        while not ended.wait(10.0):
            held.append(
                {
                    "at_s": time.monotonic() - begun,
                    "memory_bytes": sum(map(memory_bytes, servers)),
                    "descriptors": sum(map(descriptors, servers)),
                    "machine_s": _fixed_work_s(),
                }
            )

    def ask(number: int, at_s: float) -> Done:
        (queue,) = made("closed-1", tokens, 1, f"{seed} {number}", None)
        (done,) = drive(pair, [queue], "sequential")
        if number % JUDGED_EACH == 0:
            judge(pair, [queue], [done], 1, random.Random(0))
        return done | {"at_s": at_s}

    watcher = threading.Thread(target=watch)
    watcher.start()
    asked: list[Future[Done]] = []
    try:
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            at_s = 0.0
            while at_s < seconds:
                time.sleep(max(0.0, begun + at_s - time.monotonic()))
                asked.append(pool.submit(ask, len(asked), at_s))
                at_s += source.expovariate(a_second)
                if time.monotonic() - told > ROW_S:
                    told = time.monotonic()
                    waiting = sum(not one.done() for one in asked)
                    left = (seconds - at_s) / 60
                    progress.print(f"{len(asked)} requests, {waiting} on the way, {left:.0f} min left")
    finally:
        ended.set()
        watcher.join()
    return [one.result() for one in asked], held


def _fixed_work_s() -> float:
    """CPU seconds of it."""
    begun = time.thread_time()
    zlib.crc32(FIXED_WORK)
    return time.thread_time() - begun


def _rows(done: Sequence[Done], held: Sequence[Row]) -> Iterator[Row]:
    """By minute of arrival; minutes without an answer have none."""
    for minute in range(int(max(one["at_s"] for one in done) / ROW_S) + 1):
        within = [one for one in done if int(one["at_s"] / ROW_S) == minute and "error" not in one]
        sizes = [one for one in held if int(one["at_s"] / ROW_S) == minute]
        if not within or not sizes:
            continue
        ttft = [one["prefill_s"] + one["ttft_s"] for one in within]
        yield {
            "minute": minute,
            "requests": len(within),
            "ttft_p50_s": float(np.median(ttft)),
            "ttft_p99_s": float(np.percentile(ttft, 99)),
            "tpot_s": float(np.median([one["rest_s"] / (ANSWER_TOKENS - 1) for one in within])),
            "memory_bytes": max(one["memory_bytes"] for one in sizes),
            "descriptors": max(one["descriptors"] for one in sizes),
            "machine_s": float(np.median([one["machine_s"] for one in sizes])),
        }


def slopes(rows: Sequence[Row]) -> dict[str, Row]:
    """``an_hour``: by how much a line through the rows rises; ``of_median``: the same as a share. None of two rows."""
    kept = rows[int(len(rows) * SETTLING) :]
    if len(kept) < 3:
        return {}
    drawn = np.random.default_rng(0)
    hours = np.array([row["minute"] / 60 for row in kept])
    found = {}
    for key in WATCHED:
        values = np.array([float(row[key]) for row in kept])
        again: list[float] = []
        while len(again) < RESAMPLES:
            chosen = drawn.integers(len(kept), size=len(kept))
            if len(set(hours[chosen])) > 1:
                again.append(float(np.polyfit(hours[chosen], values[chosen], 1)[0]))
        rise, middle = float(np.polyfit(hours, values, 1)[0]), float(np.median(values))
        found[key] = {
            "an_hour": rise,
            "interval": interval(again),
            "of_median": rise / middle if middle else 0.0,
        }
    return found


def stable_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield (
        "requests",
        f"{result['requests']}, {result['failed']} failed, {result['wrong'] or 0} of {result['judged']} wrong",
    )
    for key, slope in result["slopes"].items():
        low, high = slope["interval"]
        yield (
            key,
            f"{slope['an_hour']:+.3g} an hour ({low:+.3g} to {high:+.3g}), {slope['of_median']:+.2%} of the median",
        )
