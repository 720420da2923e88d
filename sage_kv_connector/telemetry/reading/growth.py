# SPDX-License-Identifier: Apache-2.0
"""What grew between two snapshots of an engine, for readers that add up: engines' own metrics in other processes."""

from __future__ import annotations

from collections import Counter

import msgspec

from sage_kv_connector.telemetry.recording.metrics import METRICS, Kind
from sage_kv_connector.telemetry.recording.recorder import of_other
from sage_kv_connector.telemetry.recording.snapshot import SeriesKey, Snapshot

#: Of one bucket of a histogram: how many more, and their seconds.
BucketGrowth = dict[int, tuple[int, float]]


class Growth(msgspec.Struct):
    """``grown``: of counters; ``held``: gauges as they are; ``times``: of histograms, the buckets that grew."""

    grown: dict[str, float] = {}
    held: dict[str, float] = {}
    times: dict[str, BucketGrowth] = {}

    def add(self, later: Growth) -> None:
        """What grew after this."""
        for key, value in later.grown.items():
            self.grown[key] = self.grown.get(key, 0) + value
        for key, buckets in later.times.items():
            mine = self.times.setdefault(key, {})
            for bucket, (count, seconds) in buckets.items():
                before = mine.get(bucket, (0, 0.0))
                mine[bucket] = (before[0] + count, before[1] + seconds)
        self.held = later.held

    @property
    def is_empty(self) -> bool:
        return not (self.grown or self.times)


def text_of(key: SeriesKey) -> str:
    """A key for messages between processes."""
    return msgspec.json.encode((key.metric, *key.labels)).decode()


def key_of(text: str) -> SeriesKey:
    """Raises ValueError for what ``text_of`` did not make."""
    try:
        metric, *labels = msgspec.json.decode(text, type=list[str])
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"{text!r} names no series") from error
    if metric not in METRICS or len(labels) != len(METRICS[metric].labels):
        raise ValueError(f"{text!r} names no series")
    return SeriesKey(metric, tuple(labels))


class Growing:
    """Of one engine, also where another transport takes the place of one that is closed."""

    def __init__(self) -> None:
        self._started = 0.0
        self._sums: dict[SeriesKey, float] = {}
        self._times: dict[SeriesKey, tuple[tuple[int, ...], tuple[float, ...]]] = {}

    def take(self, now: Snapshot) -> Growth:
        """What grew since the last call. A counter that is new is told once though it is 0, so that it is shown."""
        if now.started != self._started:  # it begins at nothing
            self._started, self._sums, self._times = now.started, {}, {}
        sums = {s.key: s.value for s in now.samples if METRICS[s.metric].kind is Kind.COUNTER}
        before = Counter(self._sums)
        for key in self._sums.keys() - sums.keys():  # its peer lost its series: these numbers were told
            before[of_other(key)] += before.pop(key)
        grown = {key: value - before.get(key, 0) for key, value in sums.items()}
        times = {}
        for one in now.times:
            counts, seconds = self._times.get(one.key, ((0,) * len(one.counts), (0.0,) * len(one.counts)))
            more = {
                bucket: (count - counts[bucket], one.seconds[bucket] - seconds[bucket])
                for bucket, count in enumerate(one.counts)
                if count > counts[bucket]
            }
            if more:
                times[text_of(one.key)] = more
        new, self._sums = sums.keys() - self._sums.keys(), sums
        self._times = {one.key: (one.counts, one.seconds) for one in now.times}
        return Growth(
            {text_of(key): value for key, value in grown.items() if value > 0 or key in new},
            {text_of(s.key): s.value for s in now.samples if METRICS[s.metric].kind is Kind.GAUGE},
            times,
        )
