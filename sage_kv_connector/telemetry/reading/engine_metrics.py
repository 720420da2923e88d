# SPDX-License-Identifier: Apache-2.0
"""Our metrics as objects of prometheus-client, fed with growth: for engines that collect what their processes have.

A histogram gets each bucket's growth as so many observations of the bucket's mean, so that its count, its sum and its
buckets are those that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sage_kv_connector.telemetry.reading.growth import Growth, key_of
from sage_kv_connector.telemetry.recording.metrics import BUCKETS, METRICS, PREFIX, Kind, Metric

#: At most so many observations of one bucket at once: what is beyond counts, but as none of its own.
MOST_AT_ONCE = 4096

#: Makes a counter, gauge or histogram, as prometheus-client's classes do.
Make = Callable[..., Any]


class EngineMetrics:
    """``prefix`` comes before our names, ``first`` are the labels that the engine puts before ours."""

    def __init__(self, make: Mapping[Kind, Make], prefix: str, first: Sequence[str]) -> None:
        self._made = {
            name: self._make(make[metric.kind], prefix, first, metric) for name, metric in METRICS.items()
        }

    def _make(self, make: Make, prefix: str, first: Sequence[str], metric: Metric) -> Any:
        options: dict[str, Any] = {}
        if metric.kind is Kind.GAUGE:
            # One series for an engine, however many processes show it: the one that was told last is right.
            options["multiprocess_mode"] = "mostrecent"
        if metric.kind is Kind.HISTOGRAM:
            options["buckets"] = BUCKETS
        return make(
            name=f"{prefix}{PREFIX}{metric.name.removesuffix('_total')}",
            documentation=metric.text,
            labelnames=[*first, *metric.labels],
            **options,
        )

    def begin(self, first: Sequence[object], codes: Sequence[str]) -> None:
        """Show counters before anything happened: those without labels of ours, and failures by code."""
        for name, metric in METRICS.items():
            if metric.kind is Kind.COUNTER and metric.labels in ((), ("code",)):
                for code in codes if metric.labels else [None]:
                    self._made[name].labels(*first, *([] if code is None else [code]))

    def add(self, first: Sequence[object], growth: Growth) -> None:
        """Raises ValueError for keys that are no series."""
        for text, value in growth.grown.items():
            key = key_of(text)
            self._made[key.metric].labels(*first, *key.labels).inc(value)
        for text, value in growth.held.items():
            key = key_of(text)
            self._made[key.metric].labels(*first, *key.labels).set(value)
        for text, buckets in growth.times.items():
            key = key_of(text)
            histogram = self._made[key.metric].labels(*first, *key.labels)
            for count, seconds in buckets.values():
                observe(histogram, count, seconds / count)


def observe(histogram: Any, times: int, value: float) -> None:
    """So many observations of one value, ``MOST_AT_ONCE`` at most."""
    for _ in range(min(times, MOST_AT_ONCE)):
        histogram.observe(value)
