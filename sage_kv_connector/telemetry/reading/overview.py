# SPDX-License-Identifier: Apache-2.0
"""All engines of one place at one moment, with their rates, as ``sage-kvt top`` shows them. Seconds and bytes.

A rate is None where it can't be told: two readings make one. ``overviews`` makes it.
"""

from __future__ import annotations

import msgspec

from sage_kv_connector.telemetry.reading.gathered import NoteShown, TransferShown
from sage_kv_connector.telemetry.recording.snapshot import HotChunk


class EngineShown(msgspec.Struct, frozen=True):
    """``rates_over``: the time that its rates are of. Transfers that ended a second, by side; bytes by direction."""

    engine: str
    rank: int
    process: int
    up: float
    rates_over: float | None
    transfers_per_second: dict[str, float] | None
    failures_per_second: float | None
    bytes_per_second: dict[str, float] | None
    sessions: int
    offers: int
    subscriptions: int
    staging_bytes: int
    staging_limit_bytes: int


class Flow(msgspec.Struct, frozen=True):
    """One direction of a link. ``bytes``: since the engine started. ``utilization``: of the link's capacity."""

    bytes: float
    per_second: float | None
    utilization: float | None


class LinkShown(msgspec.Struct, frozen=True):
    """``sessions``: how many are open. The rest of the first of them; of none, empty and 0."""

    engine: str
    rank: int
    peer: str
    backend: str
    sent: Flow
    landed: Flow
    capacity: float
    sessions: int
    mode: str = ""
    reason: str = ""
    security: str = ""
    conversion: str = ""


class FailureShown(msgspec.Struct, frozen=True):
    """Transfers that ended so, and the time that they took."""

    side: str
    code: str
    count: int
    per_second: float | None
    lost_seconds: float


class FaultShown(msgspec.Struct, frozen=True):
    """A counter, or a gauge, that says by itself that something is or went wrong. ``of``: its labels' values."""

    metric: str
    of: str
    count: float
    per_second: float | None


class WireShown(msgspec.Struct, frozen=True):
    """What crossed in a dtype. ``share``: of its side's bytes. ``compression``: bytes in the caches over these."""

    side: str
    wire_dtype: str
    bytes: float
    share: float
    compression: float | None


class LatencyShown(msgspec.Struct, frozen=True):
    """Of transfers that ended well: since the engines started, and since the reading before (``late``)."""

    side: str
    backend: str
    count: int
    p50: float | None
    p90: float | None
    p99: float | None
    late_count: int
    late_p50: float | None
    late_p99: float | None


class StageShown(msgspec.Struct, frozen=True):
    """``share``: of the time of all transfers of its side."""

    side: str
    stage: str
    seconds: float
    share: float
    p99: float | None


class Overview(msgspec.Struct, frozen=True):
    """``taken``: of the newest snapshot, since 1970; 0 without any. ``silent``: who did not answer, and why."""

    taken: float
    engines: tuple[EngineShown, ...]
    links: tuple[LinkShown, ...]
    failures: tuple[FailureShown, ...]
    faults: tuple[FaultShown, ...]
    wire: tuple[WireShown, ...]
    latencies: tuple[LatencyShown, ...]
    stages: tuple[StageShown, ...]
    transfers: tuple[TransferShown, ...]
    notes: tuple[NoteShown, ...]
    hot_chunks: tuple[HotChunk, ...]
    silent: dict[str, str]
