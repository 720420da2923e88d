# SPDX-License-Identifier: Apache-2.0
"""docs/report.md: comparisons, long runs and accuracy from their JSON, and the causes of what was missed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from sage_kv_connector.bench.ab.figures import CASE
from sage_kv_connector.bench.ab.suites import SUITES
from sage_kv_connector.bench.goal import NoCause, Verdict
from sage_kv_connector.bench.marked import table
from sage_kv_connector.bench.performance.page import with_figures
from sage_kv_connector.bench.provenance import machine_text
from sage_kv_connector.bench.report.accuracy import accuracy
from sage_kv_connector.bench.report.first_screen import with_table
from sage_kv_connector.bench.report.goals import verdicts
from sage_kv_connector.bench.report.plots import draw
from sage_kv_connector.bench.report.stability import stability

#: JSON objects by the name of their file.
Runs = dict[str, Any]

#: In the folder of results: comparisons, long runs, accuracy; and why goals were missed, by a goal's text.
RUNS, STABLE, ACCURACY = "ab-*.json", "stable-*.json", "accuracy.json"
CAUSES = "causes.yaml"
#: In the folder above the page's: they have a table of the comparison, too.
READMES = ("README.md", "README.zh.md")
#: Beside the page: what single benchmarks say.
PERFORMANCE = "performance.md"
HEADS = (
    "link", "tokens", "load", "dispatch", "arm", "tokens/s", "TTFT p50, s", "p99, s", "after prefill p50, s",
    "TPOT, ms", "of iperf3", "while it carries", "MB a request", "CPU s a request (transport, conversion)", "good",
    "answers",
)  # fmt: skip


class ReportError(ValueError):
    """The folder has no run, or a goal was missed and no cause is given."""


def write_report(results: Path, document: Path) -> dict[str, Any]:
    """Writes ``document``, pictures beside it in ``images``, tables of ``READMES`` and ``PERFORMANCE``.

    Returns which goals of comparisons, long runs and accuracy were met. Raises ReportError.
    """
    try:
        return _write(results, document)
    except NoCause as cause:
        raise ReportError(f"{CAUSES}: {cause}") from None


def _write(results: Path, document: Path) -> dict[str, Any]:
    runs, stable, measured = (_read(results, pattern) for pattern in (RUNS, STABLE, ACCURACY))
    if not runs:
        raise ReportError(f"{results} has no {RUNS}: make one with `sage-kvt bench ab --out`")
    causes: dict[str, str] = yaml.safe_load((results / CAUSES).read_text()) or {}
    merged = {
        "cases": [case for run in runs.values() for case in run["cases"]],
        "ratios": [ratio for run in runs.values() for ratio in run["ratios"]],
        "stable": list(stable.values()),
        "formats": [one for run in measured.values() for one in run["formats"]],
    }
    judged = verdicts(merged)
    pictures = document.parent / "images"
    lines = [*_head(runs), *_goals(judged, causes)]
    for name, run in runs.items():
        stem = name.removesuffix(".json")
        lines += ["", f"## {stem.removeprefix('ab-').capitalize()}", *_about(run)]
        for title, path in draw(run["cases"], pictures / stem):
            lines += ["", f"![{title}]({path.relative_to(document.parent)})"]
        lines += [*_cases(run), *_lost(run), *_missing(run)]
    if stable:
        lines += ["", *stability(stable, pictures, document.parent)]
    for run in measured.values():
        lines += ["", *accuracy(run, pictures, document.parent)]
    lines += ["", *_repeat(runs, stable, measured)]
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text("\n".join(lines) + "\n")
    for readme in filter(Path.exists, (document.parent.parent / name for name in READMES)):
        readme.write_text(with_table(readme.read_text(), merged["ratios"]))
    performance = document.parent / PERFORMANCE
    if performance.exists():
        performance.write_text(with_figures(performance.read_text(), results, causes))
    return {"document": str(document), "goals": {one.goal.text: one.met for one in judged}}


def _read(results: Path, pattern: str) -> Runs:
    return {path.name: json.loads(path.read_text()) for path in sorted(results.glob(pattern))}


def _head(runs: Runs) -> Iterator[str]:
    stubbed = dict.fromkeys(run["stubbed"] for run in runs.values())
    yield "# Report: the same engine with our connector and with its peers'"
    yield ""
    yield f"**Stubbed: {'; '.join(stubbed)}.** KV is computed, written and moved as ever, and"
    yield "decode's attention is real; answers mean nothing. This page is generated from `docs/results/` by"
    yield "`sage-kvt bench report`. What each load, arm and figure is:"
    yield "[performance](performance.md#the-same-engine-side-by-side)."
    yield ""


def _goals(judged: Sequence[Verdict], causes: dict[str, str]) -> Iterator[str]:
    yield "| promised | bound | worst case measured | | |"
    yield "|---|---|---|---|---|"
    for one in judged:
        if one.worst is None:
            yield f"| {one.goal.text} | {one.bound} | – | not measured | |"
            continue
        where, figure = one.worst
        yield f"| {one.goal.text} | {one.bound} | {figure:.3g} ({where}) | {one.said()} | {one.cause(causes)} |"


def _about(run: dict[str, Any]) -> Iterator[str]:
    versions = run["versions"]
    links = ", ".join(
        f"{name}: iperf3 {of['payload_bytes_s'] * 8 / 1e9:.3f} Gb/s" for name, of in run["links"].items()
    )
    yield ""
    yield (
        f"{run['date']}, commit {run['commit']}, seed {run['seed']}, {run['rounds']} rounds. "
        f"{machine_text(run['machine'])}. "
        f"{', '.join(versions.values())}. {run['model']['kv_bytes_per_token'] / 1024:.0f} KiB of KV a token. {links}."
    )


def _cases(run: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield from table(HEADS, map(_cells, run["cases"]))


def _cells(case: dict[str, Any]) -> Iterator[str]:
    yield from (str(case[key]) for key in ("link", "tokens", "load", "dispatch", "arm"))
    yield f"{case['throughput']:.0f}"
    for key, scale in (
        ("ttft_p50_s", 1.0),
        ("ttft_p99_s", 1.0),
        ("after_prefill_p50_s", 1.0),
        ("tpot_s", 1e3),
    ):
        yield "–" if case[key] is None else f"{case[key] * scale:.3g}"
    for key in ("utilization", "busy_utilization"):
        yield "–" if case[key] is None else f"{case[key]:.2f}"
    yield "–" if case["wire_bytes"] is None else f"{case['wire_bytes'] / 1e6:.0f}"
    parts: dict[str, float] = {}
    for of in case["cpu_s"].values():
        for part, seconds in of.items():
            parts[part] = parts.get(part, 0.0) + seconds
    yield f"{sum(parts.values()):.2f} ({parts.get('transport', 0):.2f}, {parts.get('conversion', 0):.2f})"
    yield "–" if case["goodput"] is None else f"{case['goodput']:.2f}"
    said = f"{case['failed']} failed, " if case["failed"] else ""
    if case["wrong"] is None:
        yield said + (f"{case['agreement']:.2f} agree" if case["judged"] else "–")
    else:
        yield said + (f"**{case['wrong']} wrong**" if case["wrong"] else f"0 wrong of {case['judged']}")


def _lost(run: dict[str, Any]) -> Iterator[str]:
    """Where a peer is better."""
    lost = [
        one
        for one in run["ratios"]
        if one["best"]
        and one["arm"] != "alone"
        and (one["ratio"] < 1) == (one["what"] == "throughput")
        and one["ratio"] != 1
    ]
    yield ""
    if not lost:
        yield "No peer is better in any figure of any case."
        return
    yield "Where the best peer is better than an arm of ours (ratio, and the interval that holds 95 of 100 resamples):"
    yield ""
    for one in lost:
        low, high = one["interval"]
        sure = "" if low <= 1 <= high else ", sure"
        yield (
            f"* {one['link']}, {one['tokens']} tokens, {one['load']}, {one['dispatch']}: "
            f"{one['what']} of {one['arm']} is {one['ratio']:.2f} of {one['peer']}'s ({low:.2f} to {high:.2f}{sure})"
        )


def _missing(run: dict[str, Any]) -> Iterator[str]:
    for name, why in run["missing"].items():
        yield ""
        yield f"Left out: {name}: {why.splitlines()[0]}"


def _repeat(runs: Runs, stable: Runs, measured: Runs) -> Iterator[str]:
    yield "## Again"
    yield ""
    yield "As root, with iproute2 and iperf3, from a checkout:"
    yield ""
    yield "```bash"
    for name, run in runs.items():
        for words in _narrowed(name, run):
            yield f'make ab ARGS="--suite {run["suite"]} --seed {run["seed"]} --rounds {run["rounds"]}{words}"'
    for name, run in stable.items():
        words = f"--arm {run['arm']} --link {run['link']} --tokens {run['tokens']} --minutes {run['seconds'] / 60:g}"
        yield f'make bench ARGS="stable {words} --share {run["share"]} --out docs/results/{name}"'
    for name, run in measured.items():
        yield f'make accuracy ARGS="{shlex.join(run["arguments"])}" > docs/results/{name}'
    yield "make report"
    yield "```"


def _narrowed(name: str, run: dict[str, Any]) -> Iterator[str]:
    """The other words of the commands that make a run's JSON: one for all of a suite, or one for each part of it."""
    out = f" --out docs/results/{name}"
    parts: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for case in run["cases"]:
        parts.setdefault((case["link"], case["tokens"]), []).append(case)
    measured = {tuple(case[key] for key in CASE) for case in run["cases"]}
    whole = {case[:4] for group in SUITES[run["suite"]].groups for case in group.cases()}
    if measured == whole:
        yield out
        return
    for (link, tokens), cases in parts.items():
        words = "".join(
            f" --{option} {','.join(dict.fromkeys(case[key] for case in cases))}"
            for key, option in (("load", "loads"), ("dispatch", "dispatches"), ("arm", "arms"))
        )
        yield f" --links {link} --tokens {tokens}{words} --state ab.jsonl{out}"
