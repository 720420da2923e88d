# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt bench ab``: one JSON with the figures and everything needed to repeat them, and a table of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sage_kv_connector.bench.ab.arms import versions
from sage_kv_connector.bench.ab.drive import ANSWER_TOKENS
from sage_kv_connector.bench.ab.figures import figures
from sage_kv_connector.bench.ab.kept import Kept
from sage_kv_connector.bench.ab.rounds import SHAPE, run_suite
from sage_kv_connector.bench.ab.suites import EVERYTHING, SUITES, Only
from sage_kv_connector.bench.provenance import commit, provenance
from sage_kv_connector.bench.server_pairs import with_baselines
from sage_kv_connector.launch.tiny_model import SHAPES

STUBBED = "prefill attention, on all servers alike; linear layers take fp32 where the CPU has no bf16"


def bench_ab(
    suite_name: str,
    *,
    only: Only = EVERYTHING,
    seed: str = "0",
    state: Path | None = None,
) -> dict[str, Any]:
    """``cases`` and ``ratios`` (``figures``), and where, when and with what they were measured.

    ``only`` narrows a suite. ``state``: a file from which a run goes on, with more of the suite if wanted. Raises
    ServerError, LinkError, and ValueError where ``state`` keeps another run or nothing of the suite is left.
    """
    with_baselines()
    suite = SUITES[suite_name].narrowed(only)
    run = {"suite": suite_name, "seed": seed, "commit": commit(), "versions": versions()}
    kept = Kept(state, run)
    missing = run_suite(suite, seed, kept)
    return {
        **about(),
        **run,
        "rounds": suite.rounds,
        "links": kept.links,
        **figures(kept.turns, kept.links),
        "missing": missing,
    }


def about() -> dict[str, Any]:
    """With what a run was made, where and when."""
    return {
        **provenance(),
        "versions": versions(),
        "model": {"shape": SHAPES[SHAPE]._asdict(), "kv_bytes_per_token": SHAPES[SHAPE].kv_bytes_per_token},
        "answer_tokens": ANSWER_TOKENS,
        "stubbed": STUBBED,
    }


def ab_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The result as a table for people."""
    yield "stubbed", result["stubbed"]
    for case in result["cases"]:
        name = f"{case['link']}, {case['tokens']} tokens, {case['load']}, {case['dispatch']}, {case['arm']}"
        yield name, _text(case)
    for one in filter(lambda one: one["best"], result["ratios"]):
        name = f"{one['link']}, {one['tokens']} tokens, {one['load']}, {one['dispatch']}, {one['arm']}"
        low, high = one["interval"]
        yield name, f"{one['what']} {one['ratio']:.2f} ({low:.2f} to {high:.2f}) of {one['peer']}"
    for name, why in result["missing"].items():
        yield name, f"left out: {why.splitlines()[0]}"


def _text(case: dict[str, Any]) -> str:
    if case["ttft_p50_s"] is None:
        return f"all {case['requests']} requests failed"
    text = (
        f"{case['throughput']:.0f} tokens/s, TTFT {case['ttft_p50_s']:.3f} s (p99 {case['ttft_p99_s']:.3f}), "
    )
    text += f"TPOT {case['tpot_s'] * 1e3:.1f} ms"
    if case["utilization"] is not None:
        text += f", {case['utilization']:.2f} of the link"
    if case["wrong"] is None:
        text += f", {case['agreement']:.2f} of tokens agree" if case["judged"] else ""
    elif case["wrong"]:
        text += f", WRONG: {case['wrong']} of {case['judged']}"
    return text + (f", FAILED: {case['failed']} of {case['requests']}" if case["failed"] else "")
