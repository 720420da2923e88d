# SPDX-License-Identifier: Apache-2.0
"""What the report says of runs of ``sage-kvt bench stable``: a table of slopes, and each run's minutes as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sage_kv_connector.bench.report.plots import picture

#: What of each minute is drawn: lines of a panel, its title, and what they are multiplied by.
PANELS: tuple[tuple[tuple[str, ...], str, float], ...] = (
    (("ttft_p50_s", "ttft_p99_s"), "time to first token: median, p99, s", 1.0),
    (("requests",), "requests that arrived in the minute", 1.0),
    (("memory_bytes",), "memory of both servers, GiB", 2.0**-30),
    (("descriptors",), "descriptors of both servers", 1.0),
    (("machine_s",), "the machine: CPU time of a fixed piece of work, ms", 1e3),
)
COLOURS = ("#08306b", "#a63603")
WATCHED = {
    "ttft_p50_s": "TTFT p50",
    "ttft_p99_s": "TTFT p99",
    "memory_bytes": "memory",
    "descriptors": "descriptors",
}
#: Columns of the table: beside what may not grow, how slow the machine itself grew meanwhile.
SLOPES = {**WATCHED, "machine_s": "the machine's slowness"}


def name(run: Mapping[str, Any]) -> str:
    """Of a run, for people."""
    return f"{run['arm']}, {run['link']}, {run['tokens']} tokens, {run['seconds'] / 60:.0f} min"


def stability(runs: Mapping[str, Any], folder: Path, beside: Path) -> Iterator[str]:
    """Lines of the report; pictures go into ``folder``, named from ``beside``. ``runs``: by file."""
    yield "## Stability"
    yield ""
    yield "Requests arrive by Poisson at a share of what four clients at once got at the beginning. A slope is that of"
    yield "a line through the minutes after the first tenth: an hour, as a share of the median, with its 95 % interval."
    yield "The machine's slowness is the CPU time of a fixed piece of work beside the servers: times rise with it."
    yield ""
    yield f"| run | at | requests | failed | wrong | {' | '.join(SLOPES.values())} |"
    yield f"|{'---|' * (5 + len(SLOPES))}"
    for run in runs.values():
        rate = f"{run['share']:.0%} of {run['saturation_requests_s']:.3f}/s"
        wrong = "–" if run["wrong"] is None else f"{run['wrong']} of {run['judged']}"
        slopes = " | ".join(_slope(run["slopes"].get(key)) for key in SLOPES)
        yield f"| {name(run)} | {rate} | {run['requests']} | {run['failed']} | {wrong} | {slopes} |"
    for file, run in runs.items():
        path = folder / f"{file.removesuffix('.json')}.svg"
        _minutes(run, path)
        yield ""
        yield f"![{name(run)}]({path.relative_to(beside)})"


def shares(slope: Mapping[str, Any]) -> tuple[float, float]:
    """The ends of a slope's interval, as shares of the median an hour."""
    rise, of_median = slope["an_hour"], slope["of_median"]
    scale = of_median / rise if rise else 0.0
    low, high = slope["interval"]
    return low * scale, high * scale


def _slope(slope: Mapping[str, Any] | None) -> str:
    if slope is None:
        return "–"
    low, high = shares(slope)
    return f"{slope['of_median']:+.2%} ({low:+.2%} to {high:+.2%})"


def _minutes(run: Mapping[str, Any], path: Path) -> None:
    rows = run["rows"]
    with picture(path, [title for _, title, _ in PANELS]) as (figure, axes):
        for axis, (keys, _, scale) in zip(axes, PANELS, strict=True):
            for key, colour in zip(keys, COLOURS, strict=False):
                axis.plot(
                    [row["minute"] for row in rows], [row[key] * scale for row in rows], color=colour, lw=1
                )
            axis.set_ylim(bottom=0)
            axis.set_xlabel("minute")
        figure.tight_layout()
