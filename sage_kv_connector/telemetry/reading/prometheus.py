# SPDX-License-Identifier: Apache-2.0
"""Snapshots as Prometheus has them, under ``sage_kvt_*`` with the labels ``engine`` and ``rank`` before ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from sage_kv_connector.telemetry.reading.sources import Source
from sage_kv_connector.telemetry.recording.metrics import BUCKETS, METRICS, PREFIX, Kind
from sage_kv_connector.telemetry.recording.snapshot import Snapshot

_FAMILIES = {Kind.COUNTER: CounterMetricFamily, Kind.GAUGE: GaugeMetricFamily}
_ENDS = (*(f"{end:.6g}" for end in BUCKETS), "+Inf")


class Engines(Collector):
    """What a source's engines count, read when Prometheus asks."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Family]:
        found = self._source()
        yield GaugeMetricFamily(
            f"{PREFIX}engines", "Engines of this user here that answered.", value=len(found.snapshots)
        )
        yield GaugeMetricFamily(
            f"{PREFIX}silent_engines", "Engines that run and did not answer.", value=len(found.silent)
        )
        yield from families(found.snapshots)


def families(snapshots: Iterable[Snapshot]) -> Iterator[Family]:
    """One for each metric that has a series. Processes that say they are the same engine and rank are added up."""
    sums: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in METRICS}
    times: dict[str, dict[tuple[str, ...], tuple[list[int], float]]] = {name: {} for name in METRICS}
    for snapshot in snapshots:
        who = (snapshot.engine, str(snapshot.rank))
        for sample in snapshot.samples:
            of_metric = sums[sample.metric]
            labels = (*who, *sample.labels)
            of_metric[labels] = of_metric.get(labels, 0.0) + sample.value
        for one in snapshot.times:
            labels = (*who, *one.labels)
            counts, seconds = times[one.metric].get(labels, ([0] * len(one.counts), 0.0))
            together = [a + b for a, b in zip(counts, one.counts, strict=True)]
            times[one.metric][labels] = (together, seconds + sum(one.seconds))
    for name, metric in METRICS.items():
        names = ("engine", "rank", *metric.labels)
        if metric.kind is Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(f"{PREFIX}{name}", metric.text, labels=names)
            for labels, (counts, seconds) in times[name].items():
                buckets = list(zip(_ENDS, map(float, accumulate(counts)), strict=True))
                histogram.add_metric(labels, buckets=buckets, sum_value=seconds)
            yield histogram
            continue
        family = _FAMILIES[metric.kind](f"{PREFIX}{name}", metric.text, labels=names)
        for labels, value in sums[name].items():
            family.add_metric(labels, value)
        yield family
