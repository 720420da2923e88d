# SPDX-License-Identifier: Apache-2.0
"""What engines do a second, of two readings of them; quantiles and shares of their histograms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import ceil
from typing import NamedTuple

from sage_kv_connector.telemetry.reading.gathered import timed
from sage_kv_connector.telemetry.reading.growth import BucketGrowth, Growing, key_of
from sage_kv_connector.telemetry.recording.metrics import BUCKETS, METRICS
from sage_kv_connector.telemetry.recording.snapshot import SeriesKey, Snapshot, Times


class Rates(NamedTuple):
    """What an engine's counters grew by in ``seconds``."""

    seconds: float
    grown: Mapping[SeriesKey, float]
    times: Mapping[SeriesKey, BucketGrowth]

    def per_second(self, metric: str, **labels: str) -> float:
        """Of all series of a counter that have these labels."""
        names = METRICS[metric].labels
        grown = sum(
            value
            for key, value in self.grown.items()
            if key.metric == metric and labels.items() <= dict(zip(names, key.labels, strict=True)).items()
        )
        return grown / self.seconds


class _Engine(NamedTuple):
    """One transport of one process: another one that takes its place began at another time."""

    engine: str
    rank: int
    process: int
    started: float


class _Known(NamedTuple):
    growing: Growing
    taken: float


class Readings:
    """Of all engines of one place, read again and again."""

    def __init__(self) -> None:
        self._known: dict[_Engine, _Known] = {}
        self._latest: float | None = None  #: when an engine was read last

    def take(self, snapshots: Sequence[Snapshot]) -> list[Rates | None]:
        """Rates since the reading before, of an engine that began after it since then. In the snapshots' order.

        None where that can't be told: at the first reading, and of an engine that was there and not read before.
        """
        found: list[Rates | None] = []
        known: dict[_Engine, _Known] = {}
        for now in snapshots:
            who = _Engine(now.engine, now.rank, now.process, now.started)
            before = self._known.get(who)
            growing = before.growing if before else Growing()
            growth = growing.take(now)
            known[who] = _Known(growing, now.taken)
            if before is not None:
                since = before.taken
            elif self._latest is not None and now.started >= self._latest:
                since = now.started
            else:
                found.append(None)
                continue
            if now.taken <= since:
                found.append(None)
                continue
            grown = {key_of(text): value for text, value in growth.grown.items()}
            times = {key_of(text): buckets for text, buckets in growth.times.items()}
            found.append(Rates(now.taken - since, grown, times))
        self._known = known
        self._latest = max((one.taken for one in snapshots), default=self._latest)
        return found


class Spread:
    """Histograms of the same kind, added up: how many times there were in each bucket, and their seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.bucket_seconds = [0.0] * (len(BUCKETS) + 1)

    def add(self, times: Times) -> None:
        self.grow({bucket: one for bucket, one in enumerate(zip(times.counts, times.seconds, strict=True))})

    def grow(self, buckets: BucketGrowth) -> None:
        for bucket, (count, seconds) in buckets.items():
            self.counts[bucket] += count
            self.bucket_seconds[bucket] += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def seconds(self) -> float:
        return sum(self.bucket_seconds)

    def quantile(self, share: float) -> float | None:
        """Seconds that ``share`` of the times (0 to 1) don't exceed; None where there were none.

        In the bucket of the true one, so at most a factor of two away from it. Of what is longer than all buckets
        it is the mean.
        """
        if not self.count:
            return None
        place = max(1, ceil(share * self.count))
        for bucket, up_to in enumerate(accumulate(self.counts)):
            if up_to < place:
                continue
            count = self.counts[bucket]
            if bucket == len(BUCKETS):
                return max(BUCKETS[-1], self.bucket_seconds[bucket] / count)
            low = BUCKETS[bucket - 1] if bucket else 0.0
            return low + (BUCKETS[bucket] - low) * (place - (up_to - count) - 0.5) / count
        raise AssertionError("the counts are fewer than their sum")


def spreads(metric: str, snapshots: Iterable[Snapshot]) -> dict[tuple[str, ...], Spread]:
    """A histogram's series by their labels, added up over engines."""
    found: dict[tuple[str, ...], Spread] = {}
    for times in timed(snapshots, metric):
        found.setdefault(times.labels, Spread()).add(times)
    return found


def spreads_of_late(metric: str, rates: Iterable[Rates | None]) -> dict[tuple[str, ...], Spread]:
    """The same of what was added between two readings."""
    found: dict[tuple[str, ...], Spread] = {}
    for one in rates:
        for key, buckets in (one.times if one else {}).items():
            if key.metric == metric:
                found.setdefault(key.labels, Spread()).grow(buckets)
    return found


def utilization(rate: float | None, capacity: float) -> float | None:
    """The share of what a link can carry; None where either is not known. Above 1 where it was thought slower."""
    return None if rate is None or capacity <= 0 else rate / capacity
