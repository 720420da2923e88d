# SPDX-License-Identifier: Apache-2.0
"""Overviews of all engines of one place, one after the other: made of what a source found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sage_kv_connector.telemetry.reading.gathered import (
    faults,
    hottest_chunks,
    named,
    newest_notes,
    newest_transfers,
)
from sage_kv_connector.telemetry.reading.overview import (
    EngineShown,
    FailureShown,
    FaultShown,
    Flow,
    LatencyShown,
    LinkShown,
    Overview,
    StageShown,
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
from sage_kv_connector.telemetry.recording.snapshot import Snapshot

#: The newest notes that are shown.
MOST_NOTES = 8
DIRECTIONS = ("sent", "landed")


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
            transfers=newest_transfers(snapshots),
            notes=newest_notes(snapshots)[:MOST_NOTES],
            hot_chunks=hottest_chunks(snapshots),
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
    moved = {(one.labels["peer"], one.labels["backend"]) for one in named([now], "link_bytes_total")}
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
    kinds = {
        (one.labels["side"], one.labels["code"])
        for one in named(snapshots, "transfers_total")
        if one.labels["code"] != "ok"
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
    known = [one for one in rates if one is not None]
    for metric, of, count in faults(snapshots):
        (label,) = METRICS[metric].labels
        late = sum(one.per_second(metric, **{label: of}) for one in known)
        is_gauge = METRICS[metric].kind is Kind.GAUGE
        yield FaultShown(metric, of, count, None if is_gauge or not known else late)


def _wire(snapshots: Sequence[Snapshot]) -> Iterable[WireShown]:
    moved: dict[tuple[str, str], float] = defaultdict(float)
    for one in named(snapshots, "transferred_bytes_total"):
        moved[one.labels["side"], one.labels["wire_dtype"]] += one.value
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
