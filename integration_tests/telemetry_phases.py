# SPDX-License-Identifier: Apache-2.0
"""Phases of the check of metrics: a load, faults, decode started again; and the verdict on what was said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from integration_tests.cluster import new_prompt
from integration_tests.telemetry_checks import (
    ROLES,
    Ledger,
    has_promtool,
    not_moved,
    promtool_says,
    row_of,
    wrong_bytes,
    wrong_failures,
    wrong_gauges,
    wrong_sides,
)
from integration_tests.telemetry_pair import EXPORTER, METRICS, Reading, WatchedPair, between
from sage_kv_connector.launch.process import ServerError

#: Of the whole: stages that are told by themselves may differ from it by this much.
MOST_GAP = 0.05
CHECKS = ("bytes", "failures", "stages", "moved", "gauges", "promtool")
PAIR, RESTARTED, TWO_API_SERVERS = "pair", "decode restarted", "two API servers"


class Load(Protocol):
    """What sends requests and breaks them, and counts both."""

    pair: WatchedPair

    @property
    def faults(self) -> Mapping[str, Callable[[Any, Ledger], None]]:
        """By name; each breaks one hand-over of the load that it is given, and says how that counts."""
        ...

    def mixed(self) -> Ledger: ...

    def handed_over(self, prompt: list[int]) -> None: ...

    def expect(self, ledger: Ledger, tokens: int) -> None:
        """A prompt of so many tokens, none of them in decode's cache, was handed over."""
        ...


@dataclass
class Verdict:
    """``wrong``: sentences, by check. ``rows``: what was expected and said, by phase, part, role and place."""

    engine: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: dict[str, list[str]] = field(default_factory=lambda: {check: [] for check in CHECKS})
    not_moved: dict[str, str] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)

    def add(self, check: str, phase: str, *sentences: str) -> None:
        self.wrong[check] += [f"{self.engine}, {phase}: {sentence}" for sentence in sentences]

    @property
    def stages_gap(self) -> float | None:
        return max((row["stages_gap"] for row in self.rows if row["stages_gap"] is not None), default=None)


def run_phase(
    load: Load, verdict: Verdict, phase: str, faults: Sequence[str] = (), *, converted: bool = False
) -> None:
    """A mixed load, then faults (those of these names, else all), each judged by itself."""
    before = load.pair.read()
    for part, act in (("mixed", load.mixed), ("broken", lambda: _broken(load, faults))):
        with load.pair.watched():
            ledger = act()
        after = load.pair.read()
        _judge(verdict, phase, part, before, after, ledger, converted=converted)
        before = after
    for (role, place), said in before.items():
        if has_promtool():
            lines = promtool_says(said.text, ours_alone=place == METRICS)
            verdict.add("promtool", phase, *(f"{role}, {place}: {line}" for line in lines))
    verdict.add("moved", phase, *load.pair.moved.backwards)
    load.pair.moved.backwards.clear()
    verdict.moved |= load.pair.moved.metrics


def _broken(load: Load, names: Sequence[str]) -> Ledger:
    """Each fault of these names, else every one; then a hand-over that is right."""
    ledger = Ledger(lossy=True)
    for name, fault in load.faults.items():
        if not names or name in names:
            fault(load, ledger)
    prompt = new_prompt(500)
    load.handed_over(prompt)
    load.expect(ledger, len(prompt))
    return ledger


def run_restarted(load: Load, verdict: Verdict, faults: Sequence[str]) -> None:
    """Another process in decode's place: its counters begin anew, prefill's and the exporter go on."""
    pair = load.pair
    old = pair.read()
    started = pair.started("decode")
    if wrong := pair.restart_decode():
        verdict.add("moved", RESTARTED, wrong)
    if pair.started("decode") <= started:
        verdict.add("moved", RESTARTED, "decode's new engine says that it started before the old one ended")
    new = pair.read()
    for place in (METRICS, EXPORTER):
        if counted := new["decode", place].sum("transfers_total"):
            verdict.add("bytes", RESTARTED, f"decode, {place}: {counted:.0f} transfers before the first one")
        for name in ("transfers_total", "transferred_bytes_total"):
            if new["prefill", place].sum(name) != old["prefill", place].sum(name):
                verdict.add("bytes", RESTARTED, f"prefill, {place}: {name} changed while decode was away")
    run_phase(load, verdict, RESTARTED, faults)


def judge_moved(verdict: Verdict, reasons: dict[str, str]) -> None:
    """Once all phases of an engine ran."""
    verdict.not_moved, wrong = not_moved(verdict.moved, reasons)
    verdict.add("moved", "all phases", *wrong)


def lost(verdict: Verdict, phase: str, error: Exception) -> None:
    """The phase could not be run to its end."""
    kind = "" if isinstance(error, ServerError) else f"{type(error).__name__}: "
    for check in ("bytes", "failures"):
        verdict.add(check, phase, f"it ended early: {kind}{error}")


def _judge(
    verdict: Verdict,
    phase: str,
    part: str,
    before: Reading,
    after: Reading,
    ledger: Ledger,
    *,
    converted: bool,
) -> None:
    grown = between(before, after)
    where = f"{phase}, {part}"
    for (role, place), one in grown.items():
        verdict.add("bytes", where, *wrong_bytes(one, ledger, converted=converted))
        verdict.add("failures", where, *wrong_failures(one, ledger))
        row = {"engine": verdict.engine, "phase": phase, "part": part, **row_of(one, ledger)}
        verdict.rows.append(row)
        if row["stages_gap"] is not None and row["stages_gap"] > MOST_GAP:
            gap = f"{role}, {place}: stages differ from the whole by {row['stages_gap']:.1%}"
            verdict.add("stages", where, f"{gap}, allowed: {MOST_GAP:.0%}")
    for place in (METRICS, EXPORTER):
        verdict.add("bytes", where, *wrong_sides(grown["prefill", place], grown["decode", place], ledger))
    for role in ROLES:
        verdict.add("gauges", where, *wrong_gauges(role, after[role, METRICS], after[role, EXPORTER]))
