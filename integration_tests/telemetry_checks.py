# SPDX-License-Identifier: Apache-2.0
"""What two servers' metrics must say after a load that was counted beside them: bytes, failures, stages.

A ``Ledger`` holds what a load sent and what it broke; it is written by whoever sends and breaks, and knows nothing of
metrics but their names. The checks compare it with what grew between two readings of one place.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from integration_tests.scraped import NOTHING, Scrape, named
from sage_kv_connector.telemetry.recording.metrics import METRICS, PREFIX

ROLES = ("prefill", "decode")
RULES = Path(__file__).resolve().parent.parent / "dashboards" / "kv-transport.rules.yml"
#: Counters that say that something went wrong, the label that says what, and labels that must be there.
FAILURES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("transfers_total", "code", {"side": "decode"}),
    ("transfers_total", "code", {"side": "prefill"}),
    ("failed_loads_total", "code", {}),
    ("failed_offers_total", "code", {}),
    ("recomputed_tokens_total", "code", {}),
    ("dials_total", "code", {}),
    ("refused_peers_total", "code", {}),
    ("retries_total", "why", {}),
    ("aborted_loads_total", "", {}),
    ("checksum_failures_total", "", {}),
    ("forged_frames_total", "", {}),
    ("refused_chunks_total", "", {}),
)
#: What promtool says of every name that vLLM and SGLang themselves chose.
_THEIR_NAMES = "metric names should not contain ':'"


@dataclass
class Ledger:
    """``kv_bytes``: what decode's caches got. ``failures``: by role, as ``named`` writes their series.

    ``either``: of these two series one more, whichever of two ends comes first. ``lossy``: bytes may have left that
    never arrived.
    """

    kv_bytes: int = 0
    transfers: int = 0
    lossy: bool = False
    failures: dict[str, Counter[str]] = field(default_factory=lambda: {role: Counter() for role in ROLES})
    either: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {role: [] for role in ROLES})

    def moved(self, kv_bytes: int, transfers: int = 1) -> None:
        self.kv_bytes += kv_bytes
        self.transfers += transfers

    def failed(self, role: str, metric: str, count: int = 1, **labels: str) -> None:
        self.failures[role][named(metric, **labels)] += count

    def wanted(self, role: str, said: Counter[str]) -> Counter[str]:
        """Failures that must have been counted; of two that may be, the one that was."""
        wanted = Counter(self.failures[role])
        for first, second in self.either[role]:
            wanted[first if said[first] > wanted[first] else second] += 1
        return wanted


class Between(NamedTuple):
    """Two readings of one place of one server. ``place``: metrics or exporter."""

    role: str
    place: str
    before: Scrape
    after: Scrape

    def grown(self, name: str, **labels: str) -> float:
        return self.after.sum(name, **labels) - self.before.sum(name, **labels)

    def failures(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for metric, label, labels in FAILURES:
            if not label:
                found[metric] += round(self.grown(metric))
                continue
            grown = self.after.by_label(metric, label, **labels)
            grown.subtract(self.before.by_label(metric, label, **labels))
            for value, count in grown.items():
                if value != "ok":
                    found[named(metric, **{label: value}, **labels)] += count
        return Counter({series: count for series, count in found.items() if count})

    def __str__(self) -> str:
        return f"{self.role}, {self.place}"


def bytes_said(between: Between) -> dict[str, float]:
    """Every count of bytes and of transfers that ended well."""
    sent = between.role == "prefill"
    said = {
        name: between.grown(name, side=between.role)
        for name in ("transferred_bytes_total", "kv_bytes_total")[: 1 if sent else 2]
    }
    said["link_bytes_total"] = between.grown("link_bytes_total", direction="sent" if sent else "landed")
    said["transfers_total"] = between.grown("transfers_total", side=between.role, code="ok")
    if not sent and any(series.name.startswith("vllm:nixl_") for series in between.after.values):
        said["vllm:nixl_bytes_transferred"] = between.grown("vllm:nixl_bytes_transferred_sum")
        said["vllm:nixl_xfer_time_seconds_count"] = between.grown("vllm:nixl_xfer_time_seconds_count")
    return said


def wrong_bytes(between: Between, ledger: Ledger, *, converted: bool = False) -> Iterator[str]:
    """``converted``: other bytes cross than lie in the caches; the sides are compared by ``wrong_sides``."""
    said = bytes_said(between)
    wanted = {name: ledger.transfers if _counts_transfers(name) else ledger.kv_bytes for name in said}
    for name, value in said.items():
        is_known = not converted or name == "kv_bytes_total" or _counts_transfers(name)
        if ledger.lossy and name == "link_bytes_total":
            is_known = False
        if is_known and value != wanted[name]:
            yield f"{between}: {name} grew by {value:.0f}, expected {wanted[name]}"


def wrong_sides(prefill: Between, decode: Between, ledger: Ledger) -> Iterator[str]:
    """What left prefill arrived at decode; of transfers that broke some may not have."""
    sent, landed = bytes_said(prefill), bytes_said(decode)
    if sent["transferred_bytes_total"] != landed["transferred_bytes_total"]:
        yield (
            f"{prefill.place}: prefill says {sent['transferred_bytes_total']:.0f} transferred bytes, "
            f"decode {landed['transferred_bytes_total']:.0f}"
        )
    lost = sent["link_bytes_total"] - landed["link_bytes_total"]
    if lost < 0 or (lost and not ledger.lossy):
        yield f"{prefill.place}: {lost:.0f} bytes more left prefill's lanes than came to decode's"


def _counts_transfers(name: str) -> bool:
    return name == "transfers_total" or name.endswith("_count")


def wrong_failures(between: Between, ledger: Ledger) -> Iterator[str]:
    said = between.failures()
    wanted = ledger.wanted(between.role, said)
    for series in sorted(said.keys() | wanted.keys()):
        if said[series] != wanted[series]:
            yield f"{between}: {series} grew by {said[series]}, {wanted[series]} were injected"
    if between.role == "decode" and any("nixl_" in series.name for series in between.after.values):
        failed = sum(n for series, n in wanted.items() if series.startswith("transfers_total"))
        if (nixl := between.grown("vllm:nixl_num_failed_transfers_total")) != failed:
            yield f"{between}: vllm:nixl_num_failed_transfers grew by {nixl:.0f}, {failed} were injected"


def wrong_gauges(role: str, metrics: Scrape, exporter: Scrape) -> Iterator[str]:
    """At rest an engine's own /metrics holds what the exporter says."""
    own, theirs = _gauges(metrics), _gauges(exporter)
    for series in sorted(own.keys() | theirs.keys()):
        if own.get(series, 0.0) != theirs.get(series, 0.0):
            said = f"{own.get(series, 0.0):g} at /metrics, {theirs.get(series, 0.0):g} at the exporter"
            yield f"{role}: {series} is {said}"


def _gauges(said: Scrape) -> dict[str, float]:
    found: dict[str, float] = {}
    for series, value in said.ours():
        if not series.grows:
            ours = {name: of for name, of in series.labels if name in METRICS[series.metric].labels}
            written = named(series.name, **ours)
            found[written] = found.get(written, 0.0) + value
    return found


def stages_gap(after: Scrape, role: str) -> float | None:
    """By how much stages differ from the whole, as a share of it; None without a transfer."""
    whole = after.sum("transfer_seconds_sum", side=role)
    return abs(after.sum("stage_seconds_sum", side=role) / whole - 1) if whole else None


class Moved:
    """What was seen moving over all readings of all places, and what went back. One thread at a time."""

    def __init__(self) -> None:
        self.metrics: set[str] = set()
        self.backwards: list[str] = []
        self._last: dict[str, Scrape] = {}

    def hear(self, place: str, said: Scrape) -> None:
        before = self._last.get(place, NOTHING)
        for series, value in said.ours():
            if value and not series.name.endswith("_bucket"):
                self.metrics.add(series.metric)
            if series.grows and value < before.values.get(series, 0.0):
                labels = named(series.name, **dict(series.labels))
                self.backwards.append(
                    f"{place}: {labels} went from {before.values[series]:g} back to {value:g}"
                )
        if gone := [s for s, _ in before.ours() if s.grows and s not in said.values]:
            self.backwards.append(f"{place}: {named(gone[0].name, **dict(gone[0].labels))} is gone")
        self._last[place] = said

    def begins_anew(self, *places: str) -> None:
        """The process behind these places is another one."""
        for place in places:
            self._last.pop(place, None)


def not_moved(moved: Collection[str], reasons: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Metrics that nothing moved and why; and those that should have moved."""
    still = [name for name in METRICS if name not in moved]
    wrong = [f"{PREFIX}{name} did not move" for name in still if name not in reasons]
    return {f"{PREFIX}{name}": reasons[name] for name in still if name in reasons}, wrong


def promtool_says(text: str, *, ours_alone: bool) -> list[str]:
    """What ``promtool check metrics`` has against it. ``ours_alone``: of an engine's, whose other names are its own."""
    done = _promtool("metrics", text=text)
    said = (done.stdout + done.stderr).splitlines()
    if not ours_alone:
        return said if said or not done.returncode else [f"status {done.returncode}"]
    if done.returncode not in (0, 3):  # it can't be read at all
        return said
    return [line for line in said if _is_ours(line) and _THEIR_NAMES not in line]


def promtool_of_rules() -> list[str]:
    done = _promtool("rules", str(RULES))
    return [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()


def has_promtool() -> bool:
    return shutil.which("promtool") is not None


def _promtool(what: str, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", "check", what, *words], input=text, text=True, capture_output=True, timeout=60
    )


def _is_ours(line: str) -> bool:
    return PREFIX in line or "nixl_" in line


def row_of(between: Between, ledger: Ledger) -> dict[str, Any]:
    """What was expected and what was said, for a person."""
    said = between.failures()
    return {
        "role": between.role,
        "place": between.place,
        "bytes": {"expected": ledger.kv_bytes, "transfers": ledger.transfers, "said": bytes_said(between)},
        "failures": {
            "expected": dict(sorted(ledger.wanted(between.role, said).items())),
            "said": dict(sorted(said.items())),
        },
        "stages_gap": stages_gap(between.after, between.role),
    }
