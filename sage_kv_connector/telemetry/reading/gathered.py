# SPDX-License-Identifier: Apache-2.0
"""What the card and ``sage-kvt top`` both show, gathered from the snapshots of several engines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from sage_kv_connector.telemetry.recording.metrics import METRICS
from sage_kv_connector.telemetry.recording.snapshot import HotChunk, Note, Snapshot, Times, TransferRecord

#: The newest transfers and the hottest chunks that are shown.
MOST_TRANSFERS, MOST_HOT = 20, 10
#: Counters that say by themselves that something is or went wrong, and a gauge.
FAULTS = (
    "failed_loads_total",
    "failed_offers_total",
    "checksum_failures_total",
    "forged_frames_total",
    "refused_chunks_total",
    "stale_chunks_total",
    "refused_peers_total",
    "dials_total",
    "retries_total",
    "recomputed_tokens_total",
    "unused_pair",
)


class TransferShown(msgspec.Struct, frozen=True):
    """A transfer, and the engine that tells of it."""

    engine: str
    rank: int
    record: TransferRecord


class NoteShown(msgspec.Struct, frozen=True):
    engine: str
    rank: int
    note: Note


class Named(NamedTuple):
    """A sample with its labels by name."""

    metric: str
    labels: dict[str, str]
    value: float


def named(snapshots: Iterable[Snapshot], *metrics: str) -> Iterator[Named]:
    """Samples of these metrics."""
    for snapshot in snapshots:
        for sample in snapshot.samples:
            if sample.metric in metrics:
                labels = zip(METRICS[sample.metric].labels, sample.labels, strict=True)
                yield Named(sample.metric, dict(labels), sample.value)


def summed(snapshots: Iterable[Snapshot], metric: str, label: str) -> dict[str, float]:
    """The sums of a metric by the values of one of its labels."""
    found: dict[str, float] = defaultdict(float)
    for sample in named(snapshots, metric):
        found[sample.labels[label]] += sample.value
    return dict(found)


def timed(snapshots: Iterable[Snapshot], metric: str) -> Iterator[Times]:
    """Histograms of a metric, one for each engine and set of labels."""
    for snapshot in snapshots:
        yield from (times for times in snapshot.times if times.metric == metric)


def faults(snapshots: Iterable[Snapshot]) -> Iterator[tuple[str, str, float]]:
    """Of FAULTS that are not 0: the metric, its label's value, such as a backend or a code, and the sum."""
    for metric in FAULTS:
        (label,) = METRICS[metric].labels
        for of, value in sorted(summed(snapshots, metric, label).items()):
            if value and not (metric == "dials_total" and of == "ok"):
                yield metric, of, value


def newest_transfers(snapshots: Iterable[Snapshot]) -> tuple[TransferShown, ...]:
    """The newest first."""
    found = [TransferShown(one.engine, one.rank, record) for one in snapshots for record in one.transfers]
    found.sort(key=lambda shown: shown.record.began + shown.record.seconds, reverse=True)
    return tuple(found[:MOST_TRANSFERS])


def newest_notes(snapshots: Iterable[Snapshot]) -> tuple[NoteShown, ...]:
    """All of them, the newest first."""
    found = [NoteShown(one.engine, one.rank, note) for one in snapshots for note in one.notes]
    return tuple(sorted(found, key=lambda shown: shown.note.at, reverse=True))


def hottest_chunks(snapshots: Iterable[Snapshot]) -> tuple[HotChunk, ...]:
    """A chunk that several engines handed over counts for all of them."""
    handovers: Counter[tuple[str, int]] = Counter()
    for snapshot in snapshots:
        for chunk in snapshot.hot_chunks:
            handovers[chunk.digest, chunk.tokens] += chunk.handovers
    return tuple(HotChunk(*chunk, count) for chunk, count in handovers.most_common(MOST_HOT))
