# SPDX-License-Identifier: Apache-2.0
"""The transport's counters in vLLM's own log line and at its /metrics.

A worker reports its totals and what it holds right now whenever they changed.
Totals are per worker process, so both only grow there; sums over ranks are taken
where they are shown.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

#: Counter of EngineCore.counters or of the worker → what it says. All are shown as gauges,
#: since a worker that restarts begins again at 0.
SHOWN = {
    "bytes_sent": "bytes of KV sent to decode servers",
    "bytes_landed": "bytes of KV received from prefill servers",
    "checksum_failures": "chunks whose CRC32C was wrong",
    "offers": "transfers on offer, and subscriptions that wait for their prefill",
    "subscriptions": "transfers being received",
    "sessions": "connections with peers",
    "loads": "requests that wait for their KV",
    "on_offer": "prefills whose KV pages are held for decode",
    "failed_loads": "requests whose KV did not arrive and was computed again",
    "conversion_ns": "nanoseconds that conversion threads worked",
    "converted_wire_bytes": "wire bytes encoded and decoded",
    "conversions": "conversions under way",
    "staging_bytes": "staging memory in use",
}


class SageKVStats(KVConnectorStats):  # type: ignore[misc]
    """``data`` maps a tensor parallel rank (text) to its counters."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> SageKVStats:
        return SageKVStats(data={**self.data, **other.data})

    def reduce(self) -> dict[str, int | float]:
        return {name: sum(counters.get(name, 0) for counters in self.data.values()) for name in SHOWN}

    def is_empty(self) -> bool:
        return not self.data


class SageKVPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Gauges ``vllm:sage_kvt_<counter>``, summed over the ranks of an engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._seen: dict[int, SageKVStats] = {}
        self._gauges = {
            name: metric_types[Gauge](
                name=f"vllm:sage_kvt_{name}",
                documentation=f"sage_kvt: {text}.",
                labelnames=labelnames,
            )
            for name, text in SHOWN.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        seen = self._seen.get(engine_idx, SageKVStats()).aggregate(SageKVStats(data=transfer_stats_data))
        self._seen[engine_idx] = seen
        for name, value in seen.reduce().items():
            self._gauges[name].labels(*self.per_engine_labelvalues[engine_idx]).set(value)
