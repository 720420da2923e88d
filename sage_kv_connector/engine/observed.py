# SPDX-License-Identifier: Apache-2.0
"""One engine's numbers at one moment: what lanes counted, what the recorder wrote down, what is open. Any thread."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping

from sage_kv_connector.backends.base import Backend
from sage_kv_connector.engine.control.nic_speed import nic_speed
from sage_kv_connector.engine.session.table import SessionTable
from sage_kv_connector.telemetry.recording.recorder import LinkBytes, Recorder
from sage_kv_connector.telemetry.recording.snapshot import Link, Sample, Snapshot, Times

#: A backend's counter → the metric, the labels behind the backend's, and what one of it is worth.
_OF_LANES = {
    "chunks_sent": ("chunks_total", ("sent",), 1.0),
    "chunks_landed": ("chunks_total", ("landed",), 1.0),
    "send_ns": ("lane_seconds_total", ("send",), 1e-9),
    "place_ns": ("lane_seconds_total", ("place",), 1e-9),
    "verify_ns": ("lane_seconds_total", ("verify",), 1e-9),
    "d2d_ns": ("lane_seconds_total", ("copy",), 1e-9),
    "checksum_failures": ("checksum_failures_total", (), 1.0),
    "forged_frames": ("forged_frames_total", (), 1.0),
    "stale_chunks": ("stale_chunks_total", (), 1.0),
    "refused_chunks": ("refused_chunks_total", (), 1.0),
    "stalls": ("stalls_total", (), 1.0),
    "windows": ("windows", (), 1.0),
    "posts": ("posts", (), 1.0),
}
#: The same of an engine.
_OF_ENGINE = {
    "encode_ns": ("conversion_seconds_total", ("encode",), 1e-9),
    "decode_ns": ("conversion_seconds_total", ("decode",), 1e-9),
    "encoded_wire_bytes": ("converted_bytes_total", ("encode",), 1.0),
    "decoded_wire_bytes": ("converted_bytes_total", ("decode",), 1.0),
    "posting_ns": ("posting_seconds_total", (), 1e-9),
    "offers": ("offers", (), 1.0),
    "subscriptions": ("subscriptions", (), 1.0),
    "sessions": ("sessions", (), 1.0),
    "conversions": ("conversions", (), 1.0),
    "staging_bytes": ("staging_bytes", (), 1.0),
    "staging_limit_bytes": ("staging_limit_bytes", (), 1.0),
}


class Observed:
    """Of one engine: who it is, and what its numbers are made of."""

    def __init__(
        self,
        engine_id: str,
        rank: int,
        backends: Mapping[str, Backend],
        sessions: SessionTable,
        recorder: Recorder,
    ) -> None:
        self._engine_id = engine_id
        self._rank = rank
        self._backends = backends
        self._sessions = sessions
        self._recorder = recorder
        self._started = time.time()

    def snapshot(self, counters: Mapping[str, int], more: Iterable[Sample] = ()) -> Snapshot:
        """``counters``: the engine's own; ``more``: what others count of it."""
        recorder = self._recorder
        moved, speeds = recorder.links(self._moved), self._speeds()
        return Snapshot(
            engine=self._engine_id,
            rank=self._rank,
            process=os.getpid(),
            started=self._started,
            taken=time.time(),
            samples=(
                *recorder.samples(),
                *_samples(counters, _OF_ENGINE, ()),
                *(
                    sample
                    for name, backend in self._backends.items()
                    for sample in _samples(backend.counters(), _OF_LANES, (name,))
                ),
                *(
                    Sample("link_capacity_bytes_per_second", (*link, "nic"), speed)
                    for link, speed in speeds.items()
                ),
                *(Sample("refused_peers_total", (code,), count) for code, count in self._refused()),
                *more,
            ),
            times=(*recorder.times(), *self._small_posts()),
            links=tuple(self._links(moved, speeds)),
            transfers=recorder.transfers(),
            hot_chunks=recorder.hot_chunks(),
            notes=recorder.notes(),
        )

    # -- inside

    def _refused(self) -> list[tuple[str, int]]:
        return list(dict(self._sessions.refusals.by_code).items())

    def _small_posts(self) -> Iterator[Times]:
        for name, backend in self._backends.items():
            buckets = backend.small_posts()
            if any(count for count, _ in buckets):
                counts = tuple(count for count, _ in buckets)
                yield Times("small_post_seconds", (name,), counts, tuple(ns / 1e9 for _, ns in buckets))

    def _moved(self) -> Iterator[LinkBytes]:
        for backend in self._backends.values():
            for connection, sent, landed in backend.traffic():
                session = self._sessions.find(backend, connection)
                if session is not None and session.open:
                    yield session.moved(sent, landed)

    def _links(self, moved: Iterable[LinkBytes], speeds: Mapping[tuple[str, str], float]) -> Iterator[Link]:
        """A capacity is that of the network card, else of the fastest transfer so far."""
        known = {(link.backend, link.connection): link for link in moved}
        for session in self._sessions:
            plan, link = session.plan, known.get((session.backend_name, session.connection))
            if plan is None or link is None:
                continue
            mode, reason = session.way()
            yield Link(
                peer=session.label,
                backend=plan.backend,
                mode=mode,
                reason=reason,
                security=plan.security,
                checksum=plan.checksum,
                conversion=session.verdict.must_convert or "",
                sent=link.sent,
                landed=link.landed,
                capacity=speeds.get((session.label, session.backend_name), 0.0)
                or self._recorder.best(session.label, session.backend_name),
                address=session.address,
            )

    def _speeds(self) -> dict[tuple[str, str], float]:
        """Of the network cards that links go over, by peer and backend; those that are known."""
        speeds = {
            (session.label, session.backend_name): nic_speed(
                session.backend.connection_info(session.connection).local
            )
            for session in self._sessions
            if session.open and session.backend.capabilities.crosses_nodes
        }
        return {link: speed for link, speed in speeds.items() if speed}


def _samples(
    counters: Mapping[str, int],
    table: Mapping[str, tuple[str, tuple[str, ...], float]],
    first: tuple[str, ...],
) -> Iterator[Sample]:
    for name, (metric, labels, unit) in table.items():
        if name in counters:
            yield Sample(metric, (*first, *labels), counters[name] * unit)
