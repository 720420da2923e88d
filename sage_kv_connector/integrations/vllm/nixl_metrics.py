# SPDX-License-Identifier: Apache-2.0
"""``vllm:nixl_*`` of our transfers: names, kinds and buckets of vLLM's NIXL connector, so that its dashboards work.

Counts and sums are exact; which bucket a transfer falls into is as exact as ours (powers of two), and sizes of the
transfers of one report share their mean. Names and buckets: vLLM 0.30, kv_connector/v1/nixl/stats.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sage_kv_connector.telemetry.reading.engine_metrics import Make, observe
from sage_kv_connector.telemetry.reading.growth import Growth, key_of
from sage_kv_connector.telemetry.recording.metrics import METRICS, Kind

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
_BYTES = tuple(2 ** (10 + i) for i in range(1, 25, 2))
_DESCRIPTORS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)


def nixl_has_its_own(vllm_config: Any) -> bool:
    """Whether NIXL's connector serves the same engine, beside ours."""
    return "nixl" in str(getattr(vllm_config, "kv_transfer_config", "")).lower()


class NixlMetrics:
    """Fed with growth. A decode's transfers count, as there; on prefill what expired."""

    def __init__(self, make: Mapping[Kind, Make], first: Sequence[str]) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            return make[Kind.HISTOGRAM](
                name=f"vllm:nixl_{name}", documentation=text, labelnames=list(first), buckets=buckets
            )

        def counter(name: str, text: str) -> Any:
            return make[Kind.COUNTER](name=f"vllm:nixl_{name}", documentation=text, labelnames=list(first))

        self._times = {
            "wire": histogram("xfer_time_seconds", "KV transfers: time on the wire.", _SECONDS[1:]),
            "connect": histogram("post_time_seconds", "KV transfers: until they were asked for.", _SECONDS),
        }
        self._bytes = histogram("bytes_transferred", "KV transfers: bytes.", _BYTES)
        self._descriptors = histogram("num_descriptors", "KV transfers: chunks.", _DESCRIPTORS)
        self._failed = counter("num_failed_transfers", "KV transfers that failed.")
        self._expired = counter("num_kv_expired_reqs", "Prefills that nobody fetched within their lease.")

    def add(self, first: Sequence[object], growth: Growth) -> None:
        for text, buckets in growth.times.items():
            key = key_of(text)
            if key.metric == "stage_seconds" and key.labels[0] == "decode" and key.labels[1] in self._times:
                for count, seconds in buckets.values():
                    observe(self._times[key.labels[1]].labels(*first), count, seconds / count)
        ended, nbytes, chunks = 0.0, 0.0, 0.0
        for text, value in growth.grown.items():
            key = key_of(text)
            labels = dict(zip(METRICS[key.metric].labels, key.labels, strict=True))
            if (
                key.metric == "transfers_total"
                and labels["code"] == "expired"
                and labels["side"] == "prefill"
            ):
                self._expired.labels(*first).inc(value)
            elif key.metric == "transfers_total" and labels["side"] == "decode":
                if labels["code"] == "ok":
                    ended += value
                else:
                    self._failed.labels(*first).inc(value)
            elif key.metric == "transferred_bytes_total" and labels["side"] == "decode":
                nbytes += value
            elif key.metric == "chunks_total" and labels["direction"] == "landed":
                chunks += value
        if ended:
            _share(self._bytes.labels(*first), int(ended), int(nbytes))
            _share(self._descriptors.labels(*first), int(ended), int(chunks))


def _share(histogram: Any, times: int, whole: int) -> None:
    """Observe what so many transfers had together, alike but for one: means would not add up to it exactly."""
    each, more = divmod(whole, times)
    observe(histogram, more, each + 1)
    observe(histogram, times - more, each)
