# SPDX-License-Identifier: Apache-2.0
"""Overviews of all engines of one place, one after the other: made of what a source found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sage_kv_connector.telemetry.reading.overview import (
    EngineShown,
    FailureShown,
    FaultShown,
    Flow,
    LatencyShown,
    LinkShown,
    NoteShown,
    Overview,
    StageShown,
    TransferShown,
    WireShown,
)
from sage_kv_connector.telemetry.reading.rates import (
    Rates,
    Readings,
    Spread,
    spreads,
    spreads_of_late,
    utilization,
)
from sage_kv_connector.telemetry.reading.sources import Found
from sage_kv_connector.telemetry.recording.metrics import METRICS, Kind
from sage_kv_connector.telemetry.recording.snapshot import HotChunk, SeriesKey, Snapshot

#: The newest transfers and notes, and the hottest chunks.
MOST_TRANSFERS, MOST_NOTES, MOST_HOT = 20, 8, 10
DIRECTIONS = ("sent", "landed")
#: Of what these count nothing should be seen.
FAULTS = (
    "checksum_failures_total",
    "forged_frames_total",
    "stale_chunks_total",
    "refused_chunks_total",
    "refused_peers_total",
    "retries_total",
    "recomputed_tokens_total",
    "unused_pair",
)


class Overviews:
    """One after the other, of the same place."""

    def __init__(self) -> None:
        self._readings = Readings()

    def next(self, found: Found) -> Overview:
        snapshots = found.snapshots
        rates = self._readings.take(snapshots)
        pairs = list(zip(snapshots, rates, strict=True))
        return Overview(
            taken=max((one.taken for one in snapshots), default=0.0),
            engines=tuple(_engine(now, late) for now, late in pairs),
            links=tuple(link for now, late in pairs for link in _links(now, late)),
            failures=tuple(_failures(snapshots, rates)),
            faults=tuple(_faults(snapshots, rates)),
            wire=tuple(_wire(snapshots)),
            latencies=tuple(_latencies(snapshots, rates)),
            stages=tuple(_stages(snapshots)),
            transfers=_newest(snapshots),
            notes=_notes(snapshots),
            hot_chunks=_hottest(snapshots),
            silent=dict(found.silent),
        )


def _engine(now: Snapshot, late: Rates | None) -> EngineShown:
    def held(metric: str) -> int:
        return int(now.value(metric))

    return EngineShown(
        engine=now.engine,
        rank=now.rank,
        process=now.process,
        up=now.taken - now.started,
        rates_over=late and late.seconds,
        transfers_per_second=late
        and {side: late.per_second("transfers_total", side=side) for side in ("prefill", "decode")},
        failures_per_second=late
        and late.per_second("transfers_total") - late.per_second("transfers_total", code="ok"),
        bytes_per_second=late
        and {one: late.per_second("link_bytes_total", direction=one) for one in DIRECTIONS},
        sessions=held("sessions"),
        offers=held("offers"),
        subscriptions=held("subscriptions"),
        staging_bytes=held("staging_bytes"),
        staging_limit_bytes=held("staging_limit_bytes"),
    )


def _links(now: Snapshot, late: Rates | None) -> Iterable[LinkShown]:
    """Sessions, and peers that bytes moved to or from."""
    at = METRICS["link_bytes_total"].labels.index
    moved = {
        (one.labels[at("peer")], one.labels[at("backend")])
        for one in now.samples
        if one.metric == "link_bytes_total"
    }
    for peer, backend in sorted(moved | {(one.peer, one.backend) for one in now.links}):
        opened = [one for one in now.links if (one.peer, one.backend) == (peer, backend)]
        first = opened[0] if opened else None
        capacity = (
            first.capacity
            if first
            else now.value("link_capacity_bytes_per_second", peer=peer, backend=backend, source="best")
        )
        sent, landed = (_flow(now, late, capacity, peer, backend, one) for one in DIRECTIONS)
        yield LinkShown(
            engine=now.engine,
            rank=now.rank,
            peer=peer,
            backend=backend,
            sent=sent,
            landed=landed,
            capacity=capacity,
            sessions=len(opened),
            mode=first.mode if first else "",
            reason=first.reason if first else "",
            security=first.security if first else "",
            conversion=first.conversion if first else "",
        )


def _flow(
    now: Snapshot, late: Rates | None, capacity: float, peer: str, backend: str, direction: str
) -> Flow:
    labels = {"peer": peer, "backend": backend, "direction": direction}
    rate = late.per_second("link_bytes_total", **labels) if late else None
    return Flow(now.value("link_bytes_total", **labels), rate, utilization(rate, capacity))


def _failures(snapshots: Sequence[Snapshot], rates: Sequence[Rates | None]) -> list[FailureShown]:
    names = METRICS["transfers_total"].labels
    kinds = {
        (labels["side"], labels["code"])
        for now in snapshots
        for one in now.samples
        if one.metric == "transfers_total"
        for labels in [dict(zip(names, one.labels, strict=True))]
        if labels["code"] != "ok"
    }
    known = [one for one in rates if one is not None]
    found = []
    for side, code in kinds:
        labels = {"side": side, "code": code}
        found.append(
            FailureShown(
                side,
                code,
                int(sum(now.value("transfers_total", **labels) for now in snapshots)),
                sum(one.per_second("transfers_total", **labels) for one in known) if known else None,
                sum(now.value("lost_seconds_total", **labels) for now in snapshots),
            )
        )
    return sorted(found, key=lambda one: (-one.count, one.side, one.code))


def _faults(snapshots: Sequence[Snapshot], rates: Sequence[Rates | None]) -> Iterable[FaultShown]:
    counts: dict[SeriesKey, float] = {}
    for one in (sample for now in snapshots for sample in now.samples):
        if one.metric in FAULTS and one.value:
            counts[one.key] = counts.get(one.key, 0.0) + one.value
    known = [one for one in rates if one is not None]
    for key in sorted(counts, key=lambda key: (FAULTS.index(key.metric), key.labels)):
        is_gauge = METRICS[key.metric].kind is Kind.GAUGE
        late = sum(one.grown.get(key, 0.0) / one.seconds for one in known)
        yield FaultShown(
            key.metric, ", ".join(key.labels), counts[key], None if is_gauge or not known else late
        )


def _wire(snapshots: Sequence[Snapshot]) -> Iterable[WireShown]:
    names = METRICS["transferred_bytes_total"].labels
    moved: dict[tuple[str, str], float] = {}
    for one in (sample for now in snapshots for sample in now.samples):
        if one.metric == "transferred_bytes_total":
            labels = dict(zip(names, one.labels, strict=True))
            key = (labels["side"], labels["wire_dtype"])
            moved[key] = moved.get(key, 0.0) + one.value
    for (side, dtype), count in sorted(moved.items()):
        whole = sum(bytes_ for (of, _), bytes_ in moved.items() if of == side)
        kept = sum(now.value("kv_bytes_total", side=side, wire_dtype=dtype) for now in snapshots)
        share = count / whole if whole else 0.0
        yield WireShown(side, dtype, count, share, kept / count if kept and count else None)


def _latencies(snapshots: Sequence[Snapshot], rates: Sequence[Rates | None]) -> Iterable[LatencyShown]:
    late = spreads_of_late("transfer_seconds", rates)
    for (side, backend), whole in sorted(spreads("transfer_seconds", snapshots).items()):
        new = late.get((side, backend), Spread())
        yield LatencyShown(
            side=side,
            backend=backend,
            count=whole.count,
            p50=whole.quantile(0.5),
            p90=whole.quantile(0.9),
            p99=whole.quantile(0.99),
            late_count=new.count,
            late_p50=new.quantile(0.5),
            late_p99=new.quantile(0.99),
        )


def _stages(snapshots: Sequence[Snapshot]) -> Iterable[StageShown]:
    """The longest of a side first."""
    found = spreads("stage_seconds", snapshots)
    whole: dict[str, float] = {}
    for (side, _), spread in found.items():
        whole[side] = whole.get(side, 0.0) + spread.seconds
    for (side, stage), spread in sorted(found.items(), key=lambda item: (item[0][0], -item[1].seconds)):
        share = spread.seconds / whole[side] if whole[side] > 0 else 0.0
        yield StageShown(side, stage, spread.seconds, share, spread.quantile(0.99))


def _newest(snapshots: Iterable[Snapshot]) -> tuple[TransferShown, ...]:
    shown = [TransferShown(now.engine, now.rank, one) for now in snapshots for one in now.transfers]
    shown.sort(key=lambda one: one.transfer.began + one.transfer.seconds, reverse=True)
    return tuple(shown[:MOST_TRANSFERS])


def _notes(snapshots: Iterable[Snapshot]) -> tuple[NoteShown, ...]:
    shown = [NoteShown(now.engine, now.rank, note) for now in snapshots for note in now.notes]
    return tuple(sorted(shown, key=lambda one: one.note.at, reverse=True)[:MOST_NOTES])


def _hottest(snapshots: Iterable[Snapshot]) -> tuple[HotChunk, ...]:
    """Hand-overs of the same chunk by several engines are added up."""
    found: dict[str, HotChunk] = {}
    for one in (chunk for now in snapshots for chunk in now.hot_chunks):
        before = found.get(one.digest)
        handovers = one.handovers + (before.handovers if before else 0)
        found[one.digest] = HotChunk(one.digest, one.tokens, handovers)
    return tuple(sorted(found.values(), key=lambda one: -one.handovers)[:MOST_HOT])
