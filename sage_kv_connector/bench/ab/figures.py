# SPDX-License-Identifier: Apache-2.0
"""Medians, intervals and ratios of turns that are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.bench.ab.arms import ARMS, OURS
from sage_kv_connector.bench.ab.drive import wrong_answers
from sage_kv_connector.bench.ab.kept import Turn
from sage_kv_connector.bench.interval import interval

RESAMPLES = 1000
#: A request is good if its first token comes within this many times what the baseline takes unloaded.
GOOD = 2.0
BASELINE, UNLOADED = "nixl-pull", "closed-1"
#: What is compared: more is better, less is better.
HIGHER, LOWER = "throughput", ("ttft_p50", "ttft_p99", "after_prefill_p50", "tpot")
CASE = ("link", "tokens", "load", "dispatch")

Floats = npt.NDArray[np.float64]


class Timed(NamedTuple):
    """Of the requests of one arm in one case that were answered, in seconds."""

    ttft: Floats
    after_prefill: Floats
    tpot: Floats


def figures(turns: Sequence[Turn], links: dict[str, dict[str, float]]) -> dict[str, Any]:
    """``cases`` and ``ratios``; an interval holds 95 of 100 resamples."""
    by_arm = _by_case_and_arm(turns)
    cases = [_case(key, found, links, by_arm) for key, found in by_arm.items()]
    return {"cases": cases, "ratios": list(_ratios(by_arm))}


def _by_case_and_arm(turns: Sequence[Turn]) -> dict[tuple[Any, ...], list[Turn]]:
    def key(turn: Turn) -> tuple[Any, ...]:
        return (*(turn[name] for name in CASE), turn["arm"])

    return {one: list(found) for one, found in groupby(sorted(turns, key=key), key)}


def _timed(turns: Sequence[Turn]) -> Timed:
    answered = [one for turn in turns for one in turn["done"] if "error" not in one]
    return Timed(
        np.array([one["prefill_s"] + one["ttft_s"] for one in answered]),
        np.array([one["ttft_s"] for one in answered]),
        np.array([one["rest_s"] / (len(one["token_ids"]) - 1) for one in answered]),
    )


def _wall_s(turn: Turn) -> float:
    return float(max(one["ended_s"] for one in turn["done"]) - min(one["begun_s"] for one in turn["done"]))


def _tokens_s(turns: Sequence[Turn]) -> float:
    """Tokens of prompts that were answered, a second."""
    tokens = sum(one["prompt_tokens"] for turn in turns for one in turn["done"] if "error" not in one)
    return float(tokens / sum(map(_wall_s, turns)))


def _case(
    key: tuple[Any, ...],
    turns: Sequence[Turn],
    links: dict[str, dict[str, float]],
    by_arm: dict[tuple[Any, ...], list[Turn]],
) -> dict[str, Any]:
    link, tokens, _, _, arm = key
    done = [one for turn in turns for one in turn["done"]]
    timed = _timed(turns)
    judged = [one for one in done if "equal" in one]
    wire = [turn["spent"]["wire_bytes"] for turn in turns]
    utilization = busy_utilization = None
    if link in links:
        most = links[link]["link_bytes_s"]
        utilization = sum(wire) / sum(map(_wall_s, turns)) / most
        busy_s = sum(turn["spent"]["busy_s"] for turn in turns)
        moved = sum(turn["spent"]["busy_bytes"] for turn in turns)
        busy_utilization = moved / busy_s / most if busy_s else None
    unloaded = _median(_timed(by_arm.get((link, tokens, UNLOADED, "sequential", BASELINE), [])).ttft)
    target_s = GOOD * unloaded if unloaded else None
    cpu: dict[str, Counter[str]] = {"prefill": Counter(), "decode": Counter()}
    for turn in turns:
        for role, parts in turn["spent"]["cpu_s"].items():
            cpu[role].update(parts)
    return {
        **dict(zip((*CASE, "arm"), key, strict=True)),
        "requests": len(done),
        "throughput": _tokens_s(turns),
        **_quantiles("ttft", timed.ttft),
        **_quantiles("after_prefill", timed.after_prefill),
        "tpot_s": _median(timed.tpot),
        "goodput": float((timed.ttft <= target_s).sum() / len(done)) if target_s else None,
        "target_ttft_s": target_s,
        "utilization": utilization,
        "busy_utilization": busy_utilization,
        "wire_bytes": None if utilization is None else int(sum(wire) / len(done)),
        "cpu_s": {role: {part: s / len(done) for part, s in parts.items()} for role, parts in cpu.items()},
        "memory_bytes": max(turn["spent"]["memory_bytes"] for turn in turns),
        "failed": sum("error" in one for one in done),
        "judged": len(judged),
        "wrong": wrong_answers(done, lossless=ARMS[arm].lossless),
        "agreement": float(np.mean([one["equal"] for one in judged])) if judged else None,
    }


def _quantiles(name: str, of: Floats) -> dict[str, float | None]:
    return {f"{name}_p{q}_s": float(np.percentile(of, q)) if len(of) else None for q in (50, 90, 99)}


def _median(of: Floats) -> float | None:
    return float(np.median(of)) if len(of) else None


def _ratios(by_arm: dict[tuple[Any, ...], list[Turn]]) -> Iterator[dict[str, Any]]:
    """Ours against each peer that answered all of a case, or its sequential form where the peer knows no other.

    ``best``: no other peer has a better figure.
    """
    for key, ours in by_arm.items():
        *case, arm = key
        if not arm.startswith(OURS):
            continue
        peers = {}
        for name, of in ARMS.items():
            found = by_arm.get((*case, name)) or by_arm.get((*case[:-1], "sequential", name))
            if of.is_peer and found and not any("error" in one for turn in found for one in turn["done"]):
                peers[name] = found
        if not peers or not len(_timed(ours).ttft):
            continue
        for what in (HIGHER, *LOWER):
            theirs = {name: _figure(what, turns) for name, turns in peers.items()}
            best = (max if what == HIGHER else min)(theirs.values())
            for name, figure in theirs.items():
                yield {
                    **dict(zip((*CASE, "arm"), key, strict=True)),
                    "what": what,
                    "peer": name,
                    "best": figure == best,
                    "ratio": _figure(what, ours) / figure,
                    "interval": _interval(what, ours, peers[name]),
                }


def _figure(what: str, turns: Sequence[Turn]) -> float:
    return _tokens_s(turns) if what == HIGHER else _of_times(what, _timed(turns))


def _of_times(what: str, timed: Timed) -> float:
    return {
        "ttft_p50": lambda: float(np.median(timed.ttft)),
        "ttft_p99": lambda: float(np.percentile(timed.ttft, 99)),
        "after_prefill_p50": lambda: float(np.median(timed.after_prefill)),
        "tpot": lambda: float(np.median(timed.tpot)),
    }[what]()


def _interval(what: str, ours: Sequence[Turn], theirs: Sequence[Turn]) -> list[float]:
    """Of the ratio: requests are drawn anew, or whole rounds for throughput."""
    drawn = np.random.default_rng(0)

    def again(turns: Sequence[Turn], timed: Timed) -> float:
        if what == HIGHER:
            return _tokens_s([turns[i] for i in drawn.integers(len(turns), size=len(turns))])
        chosen = drawn.integers(len(timed.ttft), size=len(timed.ttft))
        return _of_times(what, Timed(*(times[chosen] for times in timed)))

    times = _timed(ours), _timed(theirs)
    ratios = [again(ours, times[0]) / again(theirs, times[1]) for _ in range(RESAMPLES)]
    return interval(ratios)
