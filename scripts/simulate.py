# SPDX-License-Identifier: Apache-2.0
"""Run the real engine over a virtual clock and a lying network, by seed (tests/simulation).

    python -m scripts.simulate [--schedules 20000 | --seconds S] [--seed 0] [--jobs N] [--json]
    python -m scripts.simulate --seed 4711 --schedules 1     that schedule alone, shrunk if it fails
    python -m scripts.simulate --planted [NAME ...]          faults planted in the engine: each must be found

After each schedule every load was answered once and in time, with the right bytes or a named failure, nothing is held
on either side, and no page was written while nobody had it. Exit status 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.simulation.planted import PLANTED
from tests.simulation.schedule import drawn
from tests.simulation.shrink import shrunk, wrong_of
from tests.simulation.world import World

BATCH = 100
#: Schedules that a planted fault must be found in.
PLANTED_SCHEDULES = 20_000
SHOWN = 5


class Batch(NamedTuple):
    """``wrong``: seed and what did not hold; failures by code."""

    schedules: int
    right: int
    steps: int
    failures: dict[str, int]
    wrong: list[tuple[int, str]]


def run_batch(first_and_count: tuple[int, int]) -> Batch:
    logging.disable(logging.CRITICAL)
    first, count = first_and_count
    right = steps = 0
    failures: Counter[str] = Counter()
    wrong: list[tuple[int, str]] = []
    for seed in range(first, first + count):
        try:
            result = World(drawn(seed)).run()
        except Exception as error:
            wrong.append((seed, f"{type(error).__name__}: {error}"))
            continue
        right, steps = right + result.right, steps + result.steps
        failures.update(result.failures)
        if result.wrong:
            wrong.append((seed, result.wrong[0]))
    return Batch(count, right, steps, dict(failures), wrong)


def find_planted(name: str) -> tuple[str, int, str]:
    """Its name, how many schedules it took (0: not found), and what was seen."""
    logging.disable(logging.CRITICAL)
    with PLANTED[name]():
        for seed in range(PLANTED_SCHEDULES):
            if wrong := wrong_of(drawn(seed)):
                return name, seed + 1, wrong[0]
    return name, 0, ""


def main() -> int:
    given = _arguments()
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        if given.planted is not None:
            return _planted(pool, given)
        return _schedules(pool, given)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=20_000, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.0, help="as many as fit, instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--stop", action="store_true", help="at the first that is wrong, and don't make it smaller"
    )
    parser.add_argument("--planted", nargs="*", choices=sorted(PLANTED), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    given = parser.parse_args()
    for name in ("schedules", "jobs"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}, must be at least 1")
    return given


def _batches(given: argparse.Namespace, began: float) -> Iterator[tuple[int, int]]:
    first, end = given.seed, given.seed + given.schedules
    while given.seconds or first < end:
        if given.seconds and time.monotonic() - began > given.seconds:
            return
        count = BATCH if given.seconds else min(BATCH, end - first)
        yield first, count
        first += count


def _schedules(pool: Any, given: argparse.Namespace) -> int:
    began = shown = time.monotonic()
    schedules = right = steps = 0
    failures: Counter[str] = Counter()
    wrong: list[tuple[int, str]] = []
    waiting: list[Any] = []
    batches = _batches(given, began)
    while True:
        # Few ahead, so that a time limit holds.
        while len(waiting) < 2 * given.jobs and (batch := next(batches, None)) is not None:
            waiting.append(pool.apply_async(run_batch, (batch,)))
        if not waiting:
            break
        done: Batch = waiting.pop(0).get()
        schedules, right, steps = schedules + done.schedules, right + done.right, steps + done.steps
        failures.update(done.failures)
        wrong += done.wrong
        for seed, what in done.wrong:
            print(f"seed {seed}: {what}", file=sys.stderr, flush=True)
        if wrong and given.stop:
            break
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            rate = schedules / (shown - began)
            left = given.seconds - (shown - began) if given.seconds else (given.schedules - schedules) / rate
            print(f"{schedules} schedules, {len(wrong)} wrong, {left:.0f} s left", file=sys.stderr)
    seconds = time.monotonic() - began
    found = {
        "schedules": schedules,
        "first_seed": given.seed,
        "wrong": len(wrong),
        "wrong_seeds": [{"seed": seed, "what": what} for seed, what in wrong[:100]],
        "loads_right": right,
        "loads_failed": dict(failures.most_common()),
        "steps": steps,
        "seconds": round(seconds, 1),
        "schedules_per_second": round(schedules / seconds, 1),
    }
    if given.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name}: {value}" for name, value in found.items() if name != "wrong_seeds"))
    for seed, what in wrong[: 0 if given.stop else SHOWN]:
        small = shrunk(drawn(seed))
        print(f"\nseed {seed}: {what}\n  as small as it gets: {small}\n  {wrong_of(small)}", file=sys.stderr)
        print(f'  again: make simulate ARGS="--seed {seed} --schedules 1"', file=sys.stderr)
    return 1 if wrong else 0


def _planted(pool: Any, given: argparse.Namespace) -> int:
    rows = []
    for name, took, what in pool.imap(find_planted, given.planted or sorted(PLANTED)):
        rows.append({"fault": name, "schedules": took, "seen": what})
        if not given.json:
            print(f"{name}: {f'found after {took} schedules: {what}' if took else 'NOT FOUND'}", flush=True)
    if given.json:
        print(json.dumps({"planted": rows, "missed": sum(not row["schedules"] for row in rows)}))
    return 0 if all(row["schedules"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
