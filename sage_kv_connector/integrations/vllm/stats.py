# SPDX-License-Identifier: Apache-2.0
"""The transport's numbers in vLLM's own log line and at its /metrics.

A worker reports how much its counters grew since its last report, and what it holds right now. vLLM hands each
report to one of its API servers, so growth adds up over them; what is held is told whole, for all ranks, since an
API server keeps what it heard last.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any

import msgspec
from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.integrations.vllm.nixl_metrics import NixlMetrics, nixl_has_its_own
from sage_kv_connector.telemetry.reading.engine_metrics import EngineMetrics
from sage_kv_connector.telemetry.reading.growth import Growing, Growth, key_of
from sage_kv_connector.telemetry.recording.metrics import Kind
from sage_kv_connector.telemetry.recording.snapshot import Snapshot

#: Without a transfer that ended a worker looks at its numbers this often.
REPORTED_EVERY_S = 0.25
#: Shown from the beginning.
_CODES = tuple(str(code) for code in FAILURE_KINDS)


class Reports:
    """What a rank reports: growth since the last report, and what it holds, whenever either changed."""

    def __init__(self, rank: int) -> None:
        self._rank = str(rank)
        self._growing = Growing()
        self._untold = Growth()
        self._held: dict[str, float] = {}
        self._state: tuple[int, ...] = ()
        self._heard_at = 0.0

    def due(self, state: tuple[int, ...]) -> bool:
        """Whether it is time to look again: something ended or began, or ``REPORTED_EVERY_S`` are over.

        ``state``: what a server that has nothing left to do must have told before it makes no more steps.
        """
        return state != self._state or time.monotonic() - self._heard_at >= REPORTED_EVERY_S

    def hear(self, now: Snapshot, state: tuple[int, ...] = ()) -> None:
        """The numbers at this moment, with the state before; also those of a transport that is about to close."""
        self._state, self._heard_at = state, time.monotonic()
        self._untold.add(self._growing.take(now))

    def take(self) -> SageKVStats | None:
        """None if nothing changed."""
        untold, self._untold = self._untold, Growth(held=self._untold.held)
        if untold.is_empty and untold.held == self._held:
            return None
        self._held = untold.held
        grown = Growth(untold.grown, {}, untold.times)
        return SageKVStats(
            data={"held": {self._rank: dict(untold.held)}, "grown": msgspec.to_builtins(grown)}
        )


class HeldByRanks:
    """What each rank of an engine last said that it holds; lives beside the scheduler, where all reports pass."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, float]] = {}
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
    """``data``: ``held`` (rank as text → gauges) and ``grown`` (a ``Growth`` without gauges)."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> SageKVStats:
        together = self.growth()
        together.add(other.growth() if isinstance(other, SageKVStats) else Growth())
        together.held = {}
        held = {**self.data.get("held", {}), **other.data.get("held", {})}
        return SageKVStats(data={"held": held, "grown": msgspec.to_builtins(together)})

    def growth(self) -> Growth:
        """With what is held, summed over ranks."""
        grown = msgspec.convert(self.data.get("grown", {}), Growth, strict=False)
        grown.held = dict(_summed(self.data.get("held", {})))
        return grown

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line: what grew since the last one and what is held, summed over labels."""
        growth = self.growth()
        shown: Tally[str] = Tally()
        for text, value in (*growth.grown.items(), *growth.held.items()):
            shown[key_of(text).metric.removesuffix("_total")] += value  # type: ignore[assignment]
        return {name: round(shown[name], 6) for name in _LOGGED}

    def is_empty(self) -> bool:
        return not self.data


#: What a log line has.
_LOGGED = (
    "link_bytes",
    "transferred_bytes",
    "transfers",
    "failed_loads",
    "failed_offers",
    "aborted_loads",
    "refused_peers",
    "retries",
    "offers",
    "subscriptions",
    "sessions",
    "loads",
    "on_offer",
    "staging_bytes",
)


def _summed(held: Mapping[str, Mapping[str, float]]) -> Tally[str]:
    sums: Tally[str] = Tally()
    for gauges in held.values():
        sums.update(gauges)
    return sums


class SageKVPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """``vllm:sage_kvt_*``, and ``vllm:nixl_*`` with the shapes that dashboards of NIXL ask for."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = {
            Kind.COUNTER: metric_types[Counter],
            Kind.GAUGE: metric_types[Gauge],
            Kind.HISTOGRAM: metric_types[Histogram],
        }
        self._metrics = EngineMetrics(make, "vllm:", labelnames)
        self._nixl = None if nixl_has_its_own(vllm_config) else NixlMetrics(make, labelnames)
        for values in per_engine_labelvalues.values():
            self._metrics.begin(values, _CODES)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values, growth = (
            self.per_engine_labelvalues[engine_idx],
            SageKVStats(data=transfer_stats_data).growth(),
        )
        self._metrics.add(values, growth)
        if self._nixl is not None:
            self._nixl.add(values, growth)
