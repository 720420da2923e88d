# SPDX-License-Identifier: Apache-2.0
"""Compare what the connector posts with what was computed, over many seeded runs of vLLM's real scheduler.

    python -m scripts.stress_schedules [--schedules 100000] [--seed 0] [--old-rule | --first-rank] [--json]

The forward pass is simulated (``tests/integrations/simulated_vllm.py``), in seventeen variants: scheduling synchronous
or asynchronous; alone, or beside another connector that loads synchronously or asynchronously; one kv group, or one
with a sliding window beside it; some with two ranks, some where vLLM holds finished prefills itself. At the end of a
run nobody fetches any more, and nothing may be held. Two broken rules stop at the first difference: ``--old-rule``,
tokens counted as computed are final before the forward pass; ``--first-rank``, pages are free when one rank said so.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time

from tests.integrations.simulated_vllm import VARIANTS, Simulation

STEPS_OF_A_RUN = 200


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    broken = parser.add_mutually_exclusive_group()
    broken.add_argument("--old-rule", action="store_true")
    broken.add_argument("--first-rank", action="store_true")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    began, seed, totals, first = (
        time.monotonic(),
        given.seed,
        {"schedules": 0, "posts": 0, "transfers": 0, "sleeps": 0, "asleep": 0},
        0,
    )
    differences: list[str] = []
    while totals["schedules"] < given.schedules and not (
        (given.old_rule or given.first_rank) and differences
    ):
        variant = VARIANTS[seed % len(VARIANTS)]
        run = Simulation(seed, variant, old_rule=given.old_rule, first_rank=given.first_rank)
        while run.steps < STEPS_OF_A_RUN and not run.differences:
            run.step()
        if not run.differences:
            run.end()
        totals["schedules"] += run.steps
        totals["posts"] += run.posted
        totals["transfers"] += run.completed
        totals["sleeps"] += run.sleeps
        totals["asleep"] += run.asleep
        if run.differences:
            differences.append(f"seed {seed} ({variant.name}), {run.differences[0]}")
            first = first or totals["schedules"]
        seed += 1
        if seed % 50 == 0:
            rate = totals["schedules"] / (time.monotonic() - began)
            left = max(0, given.schedules - totals["schedules"]) / rate
            print(
                f"{totals['schedules']} schedules, {len(differences)} differences, {left:.0f} s left",
                file=sys.stderr,
            )
    found = totals | {
        "differences": differences,
        "first_after": first,
        "seconds": round(time.monotonic() - began, 1),
    }
    if given.json:
        print(json.dumps(found))
    else:
        print(
            "\n".join(
                [*(f"{name}: {value}" for name, value in totals.items()), f"differences: {len(differences)}"]
            )
        )
        print("\n".join(differences))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
