# SPDX-License-Identifier: Apache-2.0
"""What the card shows, of snapshots of all engines: totals, as /metrics has them. Seconds and bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from types import MappingProxyType

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
    StageShown,
)
from sage_kv_connector.telemetry.reading.gathered import (
    faults,
    hottest_chunks,
    named,
    newest_notes,
    newest_transfers,
    summed,
    timed,
)
from sage_kv_connector.telemetry.recording.metrics import BUCKETS
from sage_kv_connector.telemetry.recording.snapshot import Snapshot, TransferRecord

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
            *(Fault(*one) for one in faults(snapshots)),
            *(Fault("silent_engines", f"{who}: {why}", 1) for who, why in silent.items()),
        ),
        converted_bytes=summed(snapshots, "converted_bytes_total", "work"),
        compression=tuple(_compression(snapshots)),
        stages=tuple(_stages(snapshots)),
        durations=tuple(_durations(snapshots)),
        hot_chunks=hottest_chunks(snapshots),
        transfers=newest_transfers(snapshots),
        notes=newest_notes(snapshots),
        charts=charts,
    )


def _id(snapshot: Snapshot) -> str:
    return f"{snapshot.engine}/{snapshot.rank}/{snapshot.process}/{snapshot.started}"


def _engine(one: Snapshot) -> EngineShown:
    gauges = {sample.metric: sample.value for sample in one.samples if not sample.labels}
    return EngineShown(
        id=_id(one),
        engine=one.engine,
        rank=one.rank,
        taken=one.taken,
        **{name: int(gauges.get(name, 0)) for name in GAUGES},
        work={
            **summed([one], "conversion_seconds_total", "work"),
            **summed([one], "lane_seconds_total", "work"),
        },
    )


def _links(one: Snapshot) -> Iterator[LinkShown]:
    """Whoever is named by a session, by bytes that moved or by a transfer."""
    opened = {(link.peer, link.backend) for link in one.links}
    moved: dict[tuple[str, str, str], float] = defaultdict(float)
    ended: dict[tuple[str, str, bool], float] = defaultdict(float)
    capacities: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for metric, labels, value in named(
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
    for metric, labels, value in named(snapshots, "transfers_total", "lost_seconds_total"):
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


def _compression(snapshots: Sequence[Snapshot]) -> Iterator[Compression]:
    """On decode's side: only it counts what the bytes are in the cache."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for metric, labels, value in named(snapshots, "transferred_bytes_total", "kv_bytes_total"):
        if labels["side"] == "decode":
            sums[labels["wire_dtype"]][metric] += value
    for wire_dtype, of in sorted(sums.items()):
        yield Compression(wire_dtype, of["transferred_bytes_total"], of["kv_bytes_total"])


def _stages(snapshots: Sequence[Snapshot]) -> Iterator[StageShown]:
    sums: dict[tuple[str, ...], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for times in timed(snapshots, "stage_seconds"):
        count, seconds = sums[times.labels]
        sums[times.labels] = (count + sum(times.counts), seconds + sum(times.seconds))
    for (side, stage), (count, seconds) in sums.items():
        yield StageShown(side, stage, count, seconds)


def _durations(snapshots: Sequence[Snapshot]) -> Iterator[Durations]:
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS) + 1))
    for times in timed(snapshots, "transfer_seconds"):
        counts = sums[times.labels[0]]
        for bucket, count in enumerate(times.counts[: len(counts)]):
            counts[bucket] += count
    for side, counts in sorted(sums.items()):
        yield Durations(side, tuple(counts))
