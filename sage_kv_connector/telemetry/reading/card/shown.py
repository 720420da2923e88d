# SPDX-License-Identifier: Apache-2.0
"""The form of ``card.json``: totals, in seconds and bytes. Texts that a peer chose are plain text in all of it."""

from __future__ import annotations

import msgspec

from sage_kv_connector.telemetry.reading.gathered import NoteShown, TransferShown
from sage_kv_connector.telemetry.recording.metrics import BUCKETS
from sage_kv_connector.telemetry.recording.snapshot import HotChunk


class EngineShown(msgspec.Struct, frozen=True):
    """One engine. ``id`` differs from that of an engine that had its name before it."""

    id: str
    engine: str
    rank: int
    taken: float
    sessions: int
    offers: int
    subscriptions: int
    staging_bytes: int
    staging_limit_bytes: int
    work: dict[str, float]  #: seconds: encode and decode of conversion; send, place, verify and copy of lanes


class LinkShown(msgspec.Struct, frozen=True):
    """An engine and a peer by one backend. ``of``: the engine's ``id``.

    ``capacity``: bytes a second, 0 if unknown; ``source``: nic or best.

    ``wire_seconds``, ``seconds``: medians of the ``recent`` last transfers that ended well; None without one.
    """

    id: str
    of: str
    engine: str
    rank: int
    peer: str
    backend: str
    open: bool
    sent: float
    landed: float
    capacity: float
    source: str
    transfers: float
    failed: float
    recent: int
    wire_seconds: float | None
    seconds: float | None


class Choice(msgspec.Struct, frozen=True):
    """How an open session moves KV, and why."""

    engine: str
    rank: int
    peer: str
    address: str
    backend: str
    mode: str
    reason: str
    security: str
    checksum: bool
    conversion: str


class FailureShown(msgspec.Struct, frozen=True):
    """Transfers that ended with one code. ``at`` and ``detail``: of the last one that is still remembered."""

    side: str
    code: str
    count: float
    lost_seconds: float
    meaning: str
    remedy: str
    at: float | None
    detail: str


class Fault(msgspec.Struct, frozen=True):
    """A count of something wrong that is not 0. ``of``: its label's value, such as a backend or a code."""

    metric: str
    of: str
    value: float


class Compression(msgspec.Struct, frozen=True):
    """Transfers that came in well in one wire format."""

    wire_dtype: str
    transferred_bytes: float
    kv_bytes: float


class StageShown(msgspec.Struct, frozen=True):
    """A stage of all transfers that ended well."""

    side: str
    stage: str
    count: int
    seconds: float


class Durations(msgspec.Struct, frozen=True):
    """How many transfers took how long: one count for each of ``buckets``, and what is longer."""

    side: str
    counts: tuple[int, ...]


class Contents(msgspec.Struct, frozen=True):
    """One answer of ``card.json``."""

    engines: tuple[EngineShown, ...]
    links: tuple[LinkShown, ...]
    choices: tuple[Choice, ...]
    failures: tuple[FailureShown, ...]
    faults: tuple[Fault, ...]
    converted_bytes: dict[str, float]
    compression: tuple[Compression, ...]
    stages: tuple[StageShown, ...]
    durations: tuple[Durations, ...]
    hot_chunks: tuple[HotChunk, ...]
    transfers: tuple[TransferShown, ...]
    notes: tuple[NoteShown, ...]
    buckets: tuple[float, ...] = BUCKETS
    charts: bool = False  #: whether ``charts.js`` is there
