# SPDX-License-Identifier: Apache-2.0
"""What one engine says of itself at one moment: all numbers, its links, its last transfers. JSON by msgspec."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from sage_kv_connector.telemetry.recording.metrics import BUCKETS, METRICS

#: Of the format; readers refuse another one by name.
VERSION = 1


class SeriesKey(NamedTuple):
    """A metric's name and the values of its labels, in their order."""

    metric: str
    labels: tuple[str, ...] = ()


class Sample(msgspec.Struct, frozen=True):
    """A counter or a gauge. ``labels``: values in the metric's order."""

    metric: str
    labels: tuple[str, ...]
    value: float

    @property
    def key(self) -> SeriesKey:
        return SeriesKey(self.metric, self.labels)


class Times(msgspec.Struct, frozen=True):
    """A histogram: for each of ``BUCKETS``, and what is longer, how many there were and their seconds in sum."""

    metric: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def key(self) -> SeriesKey:
        return SeriesKey(self.metric, self.labels)


class TransferRecord(msgspec.Struct, frozen=True):
    """A transfer that ended. ``began``: seconds since 1970; ``stages``: seconds, in order, they fill the whole.

    ``nbytes`` crossed, ``kv_bytes`` of KV in the cache. ``code``: ok, or the failure's. ``trace``: the W3C context that
    its request brought, "" if none reached us; ``link``: that of prefill's offer, where it is another. ``family``: the
    other name of its offer. ``retries``: of each the seconds since it began, and the code of the try before.
    """

    transfer_id: str
    side: str
    peer: str
    backend: str
    wire_dtype: str
    priority: int
    nbytes: int
    kv_bytes: int
    began: float
    seconds: float
    stages: tuple[tuple[str, float], ...]
    code: str = "ok"
    detail: str = ""
    trace: str = ""
    link: str = ""
    family: str = ""
    retries: tuple[tuple[float, str], ...] = ()


class Link(msgspec.Struct, frozen=True):
    """A session. ``mode`` and ``reason``: how the backend moves bytes, and why not better. Bytes since it opened.

    ``capacity``: bytes a second, 0 if unknown.
    """

    peer: str
    backend: str
    mode: str
    reason: str
    security: str
    checksum: bool
    conversion: str
    sent: int
    landed: int
    capacity: float
    address: str


class HotChunk(msgspec.Struct, frozen=True):
    """``digest`` of a prompt up to the chunk's end, ``tokens`` up to there, and how often it was handed over."""

    digest: str
    tokens: int
    handovers: int


class Note(msgspec.Struct, frozen=True):
    """Something that an operator is to know: when, a code, and a sentence."""

    at: float
    code: str
    text: str


class Snapshot(msgspec.Struct, frozen=True):
    """Of one engine of one process. Times in seconds since 1970."""

    engine: str
    rank: int
    process: int
    started: float
    taken: float
    samples: tuple[Sample, ...]
    times: tuple[Times, ...]
    links: tuple[Link, ...] = ()
    transfers: tuple[TransferRecord, ...] = ()
    hot_chunks: tuple[HotChunk, ...] = ()
    notes: tuple[Note, ...] = ()
    version: int = VERSION

    def value(self, metric: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        names = METRICS[metric].labels
        return sum(
            sample.value
            for sample in self.samples
            if sample.metric == metric
            and labels.items() <= dict(zip(names, sample.labels, strict=True)).items()
        )


def encode(snapshot: Snapshot) -> bytes:
    return msgspec.json.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """Raises ValueError naming the field for what is no snapshot of this version.

    Metrics that are not known here are left out: an engine may be of a later release than its reader.
    """
    try:
        found = msgspec.json.decode(data, type=Snapshot)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a telemetry snapshot: {error}") from error
    if found.version != VERSION:
        raise ValueError(f"version: {found.version} is not known, allowed: {VERSION}")
    samples = tuple(sample for sample in found.samples if sample.metric in METRICS)
    times = tuple(one for one in found.times if one.metric in METRICS)
    for metric, labels in [(one.metric, one.labels) for one in samples] + [
        (one.metric, one.labels) for one in times
    ]:
        if len(labels) != len(names := METRICS[metric].labels):
            raise ValueError(f"{metric}: labels are {labels}, must be those of {names}")
    for one in times:
        if not len(one.counts) == len(one.seconds) == len(BUCKETS) + 1:
            raise ValueError(f"{one.metric}: {len(one.counts)} buckets, must be {len(BUCKETS) + 1}")
    return msgspec.structs.replace(found, samples=samples, times=times)
