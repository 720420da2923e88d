# SPDX-License-Identifier: Apache-2.0
"""What was promised, and what runs of ``sage-kvt bench ab``, ``bench stable`` and ``make accuracy`` say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sage_kv_connector.bench.ab.drive import ANSWER_TOKENS
from sage_kv_connector.bench.goal import Found, Goal, Row, Verdict
from sage_kv_connector.bench.report import stability

LONG = (32768, 65536, 131072)
BASELINE = "nixl-pull"
#: Items from which on a loss of tasks' scores says anything.
RESOLVING_ITEMS = 500
#: How long a run is that shows stability.
STABLE_S = 7200


def _name(row: Row) -> str:
    return f"{row['link']}, {row['tokens']} tokens, {row['load']}, {row['dispatch']}"


Where = Mapping[str, tuple[Any, ...]]


def _ratios(what: str, arm: str, where: Where, peer: str | None = None) -> Callable[[Row], Found]:
    """Against ``peer``, or the best; of cases whose fields are among those of ``where``."""

    def found(result: Row) -> Found:
        for row in result["ratios"]:
            rival = row["best"] if peer is None else row["peer"] == peer
            if (row["what"], row["arm"]) == (what, arm) and rival and _among(row, where):
                yield f"{_name(row)}, to {row['peer']}", row["ratio"]

    return found


def _cases(figure: Callable[[Row], float | None], where: Where) -> Callable[[Row], Found]:
    def found(result: Row) -> Found:
        for case in result["cases"]:
            value = figure(case)
            if value is not None and _among(case, where):
                yield f"{_name(case)}, {case['arm']}", value

    return found


def _among(row: Row, where: Where) -> bool:
    return all(row[key] in allowed for key, allowed in where.items())


def _conversion(case: Row) -> float | None:
    """CPU seconds of conversion on both sides, as a share of a request's time."""
    if case["ttft_p50_s"] is None:
        return None
    seconds = sum(parts.get("conversion", 0.0) for parts in case["cpu_s"].values())
    return float(seconds / (case["ttft_p50_s"] + case["tpot_s"] * (ANSWER_TOKENS - 1)))


def _utilization(case: Row) -> float | None:
    used: float | None = case["busy_utilization"]
    return used


def _bad(case: Row) -> float:
    return float(case["failed"] + (case["wrong"] or 0))


def _stable(figure: Callable[[Row], float | None]) -> Callable[[Row], Found]:
    """Of long runs of ours."""

    def found(result: Row) -> Found:
        for run in result["stable"]:
            value = figure(run)
            if run["seconds"] >= STABLE_S and value is not None:
                yield stability.name(run), value

    return found


def _rise(key: str) -> Callable[[Row], float | None]:
    """Of a slope the low end, as a share of the median an hour: above zero it surely rises."""
    return lambda run: stability.shares(run["slopes"][key])[0] if key in run["slopes"] else None


def _losses(name: str) -> Callable[[Row], Found]:
    """On the average of the tasks, by model, where there were enough items to tell."""

    def found(result: Row) -> Found:
        for one in result["formats"]:
            items = sum(task["items"] for task in one.get("tasks", {}).values())
            if one["name"] == name and items >= RESOLVING_ITEMS:
                low, high = one["interval"]
                yield f"{one['model']}, interval {low:.2%} to {high:.2%}", one["loss"]

    return found


_OURS = ("ours-bf16", "ours-fp8", "ours-int4")
_OVER = ("ours-nixl", "ours-mooncake")
_SLOW: Where = {
    "link": ("1g",),
    "tokens": LONG,
    "load": ("closed-1", "closed-4", "rag"),
    "dispatch": ("sequential",),
}
_NODE: Where = {"link": ("node",), "tokens": (32768,), "load": ("closed-1",)}

GOALS = (
    *(
        Goal(
            f"1 Gb/s, 32K to 128K: throughput of {arm} over vLLM with NIXL",
            _ratios("throughput", arm, _SLOW, BASELINE),
            bound,
            True,
        )
        for arm, bound in (("ours-int4", 3.0), ("ours-fp8", 1.8), ("ours-bf16", 1.1))
    ),
    *(
        Goal(f"{what} below the best peer's in every load: {arm}", _ratios(what, arm, {}), 1.0, False)
        for arm in _OURS
        for what in ("ttft_p50", "ttft_p99")
    ),
    *(
        Goal(
            f"one node, 32K, {dispatch}: decode's TTFT after prefill, to the best peer",
            _ratios("after_prefill_p50", "ours-bf16", {**_NODE, "dispatch": (dispatch,)}),
            bound,
            False,
        )
        for dispatch, bound in (("sequential", 0.35), ("concurrent", 0.25))
    ),
    Goal(
        "1 Gb/s, 32K to 128K, four at once, bf16: bytes on the link while it carries some, of iperf3's",
        _cases(_utilization, {**_SLOW, "load": ("closed-4",), "arm": ("ours-bf16",)}),
        0.95,
        True,
    ),
    Goal(
        "conversion's CPU seconds, of a request's time",
        _cases(_conversion, {"arm": ("ours-fp8", "ours-int4")}),
        0.01,
        False,
    ),
    *(
        Goal(
            f"{text} that the transport alone makes (bf16, 1 Gb/s), to the best peer",
            _ratios(what, "ours-bf16", {"link": ("1g",)}),
            0.9,
            False,
        )
        for text, what in (("TTFT", "ttft_p50"), ("TPOT", "tpot"))
    ),
    *(
        Goal(
            f"TTFT p50 of ours over {name}, to vLLM's own connector on it",
            _ratios("ttft_p50", arm, {}, rival),
            1.0,
            False,
        )
        for name, arm, rival in (("NIXL", "ours-nixl", BASELINE), ("Mooncake", "ours-mooncake", "mooncake"))
    ),
    Goal("requests of ours that failed or were wrong", _cases(_bad, {"arm": (*_OURS, *_OVER)}), 0, False),
    *(
        Goal(f"accuracy: loss of {name} on the average of tasks", _losses(name), bound, False)
        for name, bound in (("fp8_e4m3", 0.002), ("int4", 0.01))
    ),
    Goal("two hours at 80 % of saturation: failed or wrong", _stable(_bad), 0, False),
    *(
        Goal(
            f"two hours at 80 % of saturation: {text} surely rises, an hour", _stable(_rise(key)), 0.01, False
        )
        for key, text in stability.WATCHED.items()
    ),
)


def verdicts(result: Row) -> list[Verdict]:
    return [Verdict(goal, list(goal.figures(result))) for goal in GOALS]
