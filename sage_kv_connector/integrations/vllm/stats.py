# SPDX-License-Identifier: Apache-2.0
"""The transport's counters in vLLM's own log line and at its /metrics.

A worker reports how much its counters grew since its last report, and what it holds right now. vLLM hands each
report to one of its API servers, so growth adds up over them; what is held is told whole, for all ranks, since an
API server keeps what it heard last.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS

#: What only grows → what it says.
COUNTERS = {
    "bytes_sent": "bytes of KV sent to decode servers",
    "bytes_landed": "bytes of KV received from prefill servers",
    "checksum_failures": "chunks whose CRC32C was wrong",
    "forged_frames": "frames that did not hold their tag",
    "conversion_ns": "nanoseconds that conversion threads worked",
    "converted_wire_bytes": "wire bytes encoded and decoded",
    "aborted_loads": "requests that were aborted while they waited for their KV",
}
#: What a rank holds → what it says.
GAUGES = {
    "offers": "transfers on offer, and subscriptions that wait for their prefill",
    "subscriptions": "transfers being received",
    "sessions": "connections with peers",
    "loads": "requests that wait for their KV",
    "on_offer": "prefills whose KV pages are held for decode",
    "conversions": "conversions under way",
    "staging_bytes": "staging memory in use",
}
#: What failed, counted by code → what it says.
FAILURES = {
    "failed_loads": "requests whose KV did not arrive and was computed again",
    "failed_offers": "prefills whose KV pages were not fetched",
    "refused_peers": "connections that were not let in",
}


class Totals(NamedTuple):
    """A worker's counters since it started. ``failures``: a name of ``FAILURES`` → code → count."""

    counters: Mapping[str, int]
    failures: Mapping[str, Mapping[str, int]]

    def go_on(self, since: Totals) -> Totals:
        """What grew goes on from these to ``since``, counted by a transport made anew; what is held is its own."""
        grown = {name: self.counters.get(name, 0) + since.counters.get(name, 0) for name in COUNTERS}
        failures = {
            name: Tally(self.failures.get(name, {})) + Tally(since.failures.get(name, {}))
            for name in FAILURES
        }
        return Totals({**since.counters, **grown}, failures)


NONE_YET = Totals({}, {})


class Reports:
    """What a rank reports: growth since the last report, and what it holds, whenever either changed."""

    def __init__(self, rank: int) -> None:
        self._rank = str(rank)
        self._grown: Tally[str] = Tally()
        self._failed: dict[str, Tally[str]] = {name: Tally() for name in FAILURES}
        self._held: dict[str, int] = {}

    def take(self, totals: Totals) -> SageKVStats | None:
        """None if nothing changed."""
        grown = Tally({name: totals.counters.get(name, 0) for name in COUNTERS})
        failed = {name: Tally(totals.failures.get(name, {})) for name in FAILURES}
        held = {name: totals.counters.get(name, 0) for name in GAUGES}
        if (grown, failed, held) == (self._grown, self._failed, self._held):
            return None
        report = {
            "held": {self._rank: held},
            "grown": dict(grown - self._grown),
            **{name: dict(failed[name] - self._failed[name]) for name in FAILURES},
        }
        self._grown, self._failed, self._held = grown, failed, held
        return SageKVStats(data=report)


class HeldByRanks:
    """What each rank of an engine last said that it holds; lives beside the scheduler, where all reports pass."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, int]] = {}
        self._heard = False

    def hear(self, report: object) -> None:
        """A step's report of some of the ranks; anything else is not ours."""
        if isinstance(report, SageKVStats):
            self._held.update(report.data.get("held", {}))
            self._heard = True

    def take(self) -> SageKVStats | None:
        """What all of them hold, if there was a report since the last call."""
        heard, self._heard = self._heard, False
        return SageKVStats(data={"held": dict(self._held)}) if heard else None


class SageKVStats(KVConnectorStats):  # type: ignore[misc]
    """``data``: ``held`` (rank as text → gauges), ``grown`` (counters), and of ``FAILURES`` each (code → count)."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> SageKVStats:
        sums = {
            name: dict(Tally(self.data.get(name, {})) + Tally(other.data.get(name, {})))
            for name in ("grown", *FAILURES)
        }
        return SageKVStats(data={"held": {**self.data.get("held", {}), **other.data.get("held", {})}, **sums})

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line: growth since the last one, failures in sum, and what is held."""
        grown = self.data.get("grown", {})
        return {
            **{name: grown.get(name, 0) for name in COUNTERS},
            **{name: sum(self.data.get(name, {}).values()) for name in FAILURES},
            **self.held(),
        }

    def held(self) -> dict[str, int]:
        """Summed over ranks."""
        ranks = self.data.get("held", {}).values()
        return {name: sum(gauges.get(name, 0) for gauges in ranks) for name in GAUGES}

    def is_empty(self) -> bool:
        return not self.data


class SageKVPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """``vllm:sage_kvt_*``: counters (``…_total``), failures with a label ``code``, gauges summed over ranks."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)

        def made(kind: Any, name: str, text: str, labels: list[str], **options: str) -> Any:
            return metric_types[kind](
                name=f"vllm:sage_kvt_{name}", documentation=f"sage_kvt: {text}.", labelnames=labels, **options
            )

        self._counters = {name: made(Counter, name, text, labelnames) for name, text in COUNTERS.items()}
        self._failures = {
            name: made(Counter, name, text, [*labelnames, "code"]) for name, text in FAILURES.items()
        }
        # One series for an engine, however many API servers it has: the one that was told last is right.
        self._gauges = {
            name: made(Gauge, name, text, labelnames, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        for values in per_engine_labelvalues.values():
            for counter in self._counters.values():
                counter.labels(*values)
            for failures in self._failures.values():
                for code in FAILURE_KINDS:
                    failures.labels(*values, str(code))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values, stats = self.per_engine_labelvalues[engine_idx], SageKVStats(data=transfer_stats_data)
        for name, grown in stats.data.get("grown", {}).items():
            self._counters[name].labels(*values).inc(grown)
        for name, counters in self._failures.items():
            for code, count in stats.data.get(name, {}).items():
                counters.labels(*values, code).inc(count)
        if stats.data.get("held"):
            for name, value in stats.held().items():
                self._gauges[name].labels(*values).set(value)
