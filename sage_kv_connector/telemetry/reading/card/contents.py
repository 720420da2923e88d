# SPDX-License-Identifier: Apache-2.0
"""What the card shows, of snapshots of all engines: totals, as /metrics has them. Seconds and bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import NamedTuple

from sage_kv_connector.contract.failure import Code
from sage_kv_connector.contract.failure_kinds import FAILURE_KINDS
from sage_kv_connector.telemetry.reading.card.shown import (
    Choice,
    Compression,
    Contents,
    Durations,
    EngineShown,
    FailureShown,
    Fault,
    LinkShown,
    NoteShown,
    StageShown,
    TransferShown,
)
from sage_kv_connector.telemetry.recording.metrics import BUCKETS, METRICS
from sage_kv_connector.telemetry.recording.snapshot import HotChunk, Snapshot, Times, TransferRecord

#: The newest transfers and the hottest chunks that are shown.
MOST_TRANSFERS, MOST_HOT = 20, 10

#: Counters that say by themselves that something is wrong, and a gauge.
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
NOBODY: Mapping[str, str] = MappingProxyType({})
GAUGES = ("sessions", "offers", "subscriptions", "staging_bytes", "staging_limit_bytes")


def contents(
    snapshots: Sequence[Snapshot], silent: Mapping[str, str] = NOBODY, *, charts: bool = False
) -> Contents:
    """Of the engines that ``snapshots`` tell of. ``silent``: why others did not answer."""
    return Contents(
        engines=tuple(_engine(one) for one in snapshots),
        links=tuple(link for one in snapshots for link in _links(one)),
        choices=tuple(
            Choice(
                one.engine,
                one.rank,
                link.peer,
                link.address,
                link.backend,
                link.mode,
                link.reason,
                link.security,
                link.checksum,
                link.conversion,
            )
            for one in snapshots
            for link in one.links
        ),
        failures=tuple(_failures(snapshots)),
        faults=(
            *_faults(snapshots),
            *(Fault("silent_engines", f"{who}: {why}", 1) for who, why in silent.items()),
        ),
        converted_bytes=_by(snapshots, "converted_bytes_total", "work"),
        compression=tuple(_compression(snapshots)),
        stages=tuple(_stages(snapshots)),
        durations=tuple(_durations(snapshots)),
        hot_chunks=_hottest(snapshots),
        transfers=_newest(snapshots),
        notes=tuple(
            sorted(
                (NoteShown(one.engine, one.rank, note) for one in snapshots for note in one.notes),
                key=lambda shown: shown.note.at,
                reverse=True,
            )
        ),
        charts=charts,
    )


def _id(snapshot: Snapshot) -> str:
    return f"{snapshot.engine}/{snapshot.rank}/{snapshot.process}/{snapshot.started}"


class _Named(NamedTuple):
    metric: str
    labels: dict[str, str]
    value: float


def _named(snapshots: Iterable[Snapshot], *metrics: str) -> Iterator[_Named]:
    """Samples of these metrics. An engine of another release may have other labels: those are left out."""
    for snapshot in snapshots:
        for sample in snapshot.samples:
            if sample.metric in metrics and len(names := METRICS[sample.metric].labels) == len(sample.labels):
                yield _Named(sample.metric, dict(zip(names, sample.labels, strict=True)), sample.value)


def _by(snapshots: Iterable[Snapshot], metric: str, label: str) -> dict[str, float]:
    """The sums of a metric by the values of one of its labels."""
    found: dict[str, float] = defaultdict(float)
    for sample in _named(snapshots, metric):
        found[sample.labels[label]] += sample.value
    return dict(found)


def _engine(one: Snapshot) -> EngineShown:
    gauges = {sample.metric: sample.value for sample in one.samples if not sample.labels}
    return EngineShown(
        id=_id(one),
        engine=one.engine,
        rank=one.rank,
        taken=one.taken,
        **{name: int(gauges.get(name, 0)) for name in GAUGES},
        work={**_by([one], "conversion_seconds_total", "work"), **_by([one], "lane_seconds_total", "work")},
    )


def _links(one: Snapshot) -> Iterator[LinkShown]:
    """Whoever is named by a session, by bytes that moved or by a transfer."""
    opened = {(link.peer, link.backend) for link in one.links}
    moved: dict[tuple[str, str, str], float] = defaultdict(float)
    ended: dict[tuple[str, str, bool], float] = defaultdict(float)
    capacities: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for metric, labels, value in _named(
        [one], "link_bytes_total", "transfers_total", "link_capacity_bytes_per_second"
    ):
        peer, backend = labels["peer"], labels["backend"]
        if metric == "link_bytes_total":
            moved[peer, backend, labels["direction"]] += value
        elif metric == "transfers_total":
            ended[peer, backend, labels["code"] == "ok"] += value
        elif value > 0:
            capacities[peer, backend][labels["source"]] = value
    for link in sorted({*opened, *((peer, backend) for peer, backend, _ in (*moved, *ended))}):
        recent = [
            record for record in one.transfers if (record.peer, record.backend, record.code) == (*link, "ok")
        ]
        wire = [seconds for record in recent for stage, seconds in record.stages if stage == "wire"]
        source = next((source for source in ("nic", "best") if source in capacities[link]), "")
        yield LinkShown(
            id=f"{_id(one)}/{'/'.join(link)}",
            of=_id(one),
            engine=one.engine,
            rank=one.rank,
            peer=link[0],
            backend=link[1],
            open=link in opened,
            sent=moved[*link, "sent"],
            landed=moved[*link, "landed"],
            capacity=capacities[link].get(source, 0.0),
            source=source,
            transfers=ended[*link, True] + ended[*link, False],
            failed=ended[*link, False],
            recent=len(recent),
            wire_seconds=median(wire) if wire else None,
            seconds=median(record.seconds for record in recent) if recent else None,
        )


def _failures(snapshots: Sequence[Snapshot]) -> Iterator[FailureShown]:
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    for metric, labels, value in _named(snapshots, "transfers_total", "lost_seconds_total"):
        sums[metric, labels["side"], labels["code"]] += value
    last: dict[tuple[str, str], TransferRecord] = {}
    for record in (record for snapshot in snapshots for record in snapshot.transfers):
        known = last.get((record.side, record.code))
        if known is None or record.began + record.seconds > known.began + known.seconds:
            last[record.side, record.code] = record
    counts = {(side, code): n for (metric, side, code), n in sums.items() if metric == "transfers_total"}
    for (side, code), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if code == "ok":
            continue
        kind = FAILURE_KINDS[Code(code) if code in set(Code) else Code.OTHER]
        newest = last.get((side, code))
        yield FailureShown(
            side=side,
            code=code,
            count=count,
            lost_seconds=sums["lost_seconds_total", side, code],
            meaning=kind.meaning,
            remedy=kind.remedy,
            at=newest.began + newest.seconds if newest else None,
            detail=newest.detail if newest else "",
        )


def _faults(snapshots: Sequence[Snapshot]) -> Iterator[Fault]:
    for metric in FAULTS:
        (label,) = METRICS[metric].labels
        for of, value in sorted(_by(snapshots, metric, label).items()):
            if value and not (metric == "dials_total" and of == "ok"):
                yield Fault(metric, of, value)


def _compression(snapshots: Sequence[Snapshot]) -> Iterator[Compression]:
    """On decode's side: only it counts what the bytes are in the cache."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for metric, labels, value in _named(snapshots, "transferred_bytes_total", "kv_bytes_total"):
        if labels["side"] == "decode":
            sums[labels["wire_dtype"]][metric] += value
    for wire_dtype, of in sorted(sums.items()):
        yield Compression(wire_dtype, of["transferred_bytes_total"], of["kv_bytes_total"])


def _times(snapshots: Sequence[Snapshot], metric: str) -> Iterator[Times]:
    for snapshot in snapshots:
        for times in snapshot.times:
            if (times.metric, len(times.labels)) == (metric, len(METRICS[metric].labels)):
                yield times


def _stages(snapshots: Sequence[Snapshot]) -> Iterator[StageShown]:
    sums: dict[tuple[str, ...], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for times in _times(snapshots, "stage_seconds"):
        count, seconds = sums[times.labels]
        sums[times.labels] = (count + sum(times.counts), seconds + sum(times.seconds))
    for (side, stage), (count, seconds) in sums.items():
        yield StageShown(side, stage, count, seconds)


def _durations(snapshots: Sequence[Snapshot]) -> Iterator[Durations]:
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS) + 1))
    for times in _times(snapshots, "transfer_seconds"):
        counts = sums[times.labels[0]]
        for bucket, count in enumerate(times.counts[: len(counts)]):
            counts[bucket] += count
    for side, counts in sorted(sums.items()):
        yield Durations(side, tuple(counts))


def _hottest(snapshots: Sequence[Snapshot]) -> tuple[HotChunk, ...]:
    """A chunk that several engines handed over counts for all of them."""
    handovers: Counter[tuple[str, int]] = Counter()
    for snapshot in snapshots:
        for chunk in snapshot.hot_chunks:
            handovers[chunk.digest, chunk.tokens] += chunk.handovers
    return tuple(HotChunk(*chunk, count) for chunk, count in handovers.most_common(MOST_HOT))


def _newest(snapshots: Sequence[Snapshot]) -> tuple[TransferShown, ...]:
    found = [TransferShown(one.engine, one.rank, record) for one in snapshots for record in one.transfers]
    found.sort(key=lambda shown: shown.record.began + shown.record.seconds, reverse=True)
    return tuple(found[:MOST_TRANSFERS])
