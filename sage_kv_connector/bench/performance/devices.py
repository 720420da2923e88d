# SPDX-License-Identifier: Apache-2.0
"""Tables of emulated devices."""

from __future__ import annotations

from collections.abc import Iterator

from sage_kv_connector.bench.goal import Found, Goal
from sage_kv_connector.bench.marked import table
from sage_kv_connector.bench.performance.table import Results, Row, two


def stages(results: Results) -> Iterator[str]:
    """Busy seconds of each stage of a hand-over between two emulated devices."""
    names = list(dict.fromkeys(name for one in results for name in one["stages"]))
    heads = ["from, to", "way", "emulated copies", *names, "elapsed", "of the slowest stage", "bits"]

    def row(one: Row) -> Iterator[str]:
        yield f"{one['chips']['prefill']}, {one['chips']['decode']}"
        yield f"{one['plan']['wire_dtype']}, {one['plan']['way']}"
        yield f"{one['plan']['dma_gbytes_per_s']:g} GB/s"
        yield from (
            f"{one['stages'][name]['busy_s']:.2f} s" if name in one["stages"] else "–" for name in names
        )
        yield f"{one['elapsed_s']:.2f} s"
        yield f"**{two(one['to_slowest_stage'])}** ({one['slowest_stage']})"
        yield "equal" if one["bit_identical"] else "**WRONG**"

    yield from table(heads, map(row, results))


def _to_slowest(row: Row) -> Found:
    for one in row["results"]:
        yield (
            f"{one['chips']['prefill']} to {one['chips']['decode']}, {one['plan']['dma_gbytes_per_s']:g} GB/s",
            one["to_slowest_stage"],
        )


STAGE_GOALS = (Goal("emulated devices: elapsed, of the slowest stage", _to_slowest, 1.1, False),)
