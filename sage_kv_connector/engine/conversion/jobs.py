# SPDX-License-Identifier: Apache-2.0
"""Conversion jobs of one engine: their threads, their staging memory, their completions.

Two arenas, one for each direction, so that an engine that both sends and receives can't
block itself. Control thread only, but for the pool's own threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.conversion.peer_reads import PeerReads
from sage_kv_connector.engine.conversion.staging import StagingArena
from sage_kv_connector.engine.conversion.wire_plan import Formats, group_converter
from sage_kv_connector.format.converter import GroupConverter, Span

#: Ends of jobs that are taken from the pool's queue at once.
POLLED_AT_ONCE = 256

#: Called once when a job ended: why it failed, "" if it did not.
OnConverted = Callable[[str], None]


class JobEnded(NamedTuple):
    """Of a lane's queue: a job, and why it failed ("" if it did not)."""

    job: int
    error: str
    time_ns: int


class PoolEvent(IntEnum):
    """Kinds of events in a pool's queue, of the job or the part stream (``csrc/parts/part_stream.h``) ``id``."""

    CONVERTED = 9  #: the job ended (status, length = bytes)
    PARTS_READY = 10  #: pages of the first parts are final, or can't be had (status, detail)
    PARTS_DONE = 11  #: every part is decoded, or one can't be (began_ns, offset: when the first
    #: and the last bytes came, in nanoseconds; length = bytes, status, detail)
    PART_TO_CONVERT = 12  #: a part that Python converts (offset = its number, length = bytes)


PartStream = _data_plane.PartEncoder | _data_plane.PartDecoder


class PartCoder(Protocol):
    """What converts the parts of one stream."""

    def close(self) -> None:
        """After this no page and no staging memory is touched, and no event comes. Idempotent."""
        ...


class Conversions(Protocol):
    """Jobs between pages and wire bytes, wherever the pages lie.

    ``outgoing`` and ``incoming`` are the memory that wire bytes wait in. A job ends in one call of
    ``done`` unless it is cancelled; after ``cancel`` returns it touches no memory. ``encode`` and
    ``decode`` take what ``group`` made, and raise ValueError as it does.
    """

    outgoing: StagingArena
    incoming: StagingArena
    pool: _data_plane.ConversionPool

    @property
    def peer_reads(self) -> PeerReads | None:
        """None where pages lie in host memory."""
        ...

    def attach(self, loop: ControlLoop) -> None:
        """Let ``loop`` watch for ends of jobs; once, before it starts."""
        ...

    def group(
        self,
        view: GroupView,
        index: int,
        formats: Formats,
        local: KVCacheSchema,
        consumer: KVCacheSchema,
        producer: KVCacheSchema,
    ) -> Any: ...

    def in_lanes(self, groups: Mapping[int, Any]) -> list[tuple[int, _data_plane.PagedConverter]]:
        """What a part stream converts groups with; nothing where it can't, and asks."""
        ...

    def code(
        self, stream: PartStream, groups: Mapping[int, Any], on_event: Callable[[Event], None]
    ) -> PartCoder:
        """Convert the parts of a stream. ``on_event`` gets its events but for PART_TO_CONVERT."""
        ...

    def counters(self) -> dict[str, int]: ...

    def close(self) -> None: ...


class _InLanes:
    """Its pool converts by itself: there is nothing to do but to hand events on."""

    def __init__(self, streams: dict[int, Callable[[Event], None]], stream: PartStream) -> None:
        self._streams, self._stream = streams, stream

    def close(self) -> None:
        self._streams.pop(self._stream.id, None)
        self._stream.close()


class CpuConversions:
    """Pages in host memory: the kernels run on a pool's threads."""

    group = staticmethod(group_converter)
    peer_reads = None

    def __init__(
        self,
        threads: int,
        staging_bytes: int,
        register: Callable[[int, int], None],
        allocate: Callable[[int], int] | None = None,
    ) -> None:
        self.pool = _data_plane.ConversionPool(threads)
        self.outgoing = StagingArena(staging_bytes, register, allocate)
        self.incoming = StagingArena(staging_bytes, register, allocate)
        # The pool works on the converter's memory: it is kept until the job is over.
        self._jobs: dict[int, tuple[GroupConverter, OnConverted]] = {}
        self._streams: dict[int, Callable[[Event], None]] = {}

    def in_lanes(self, groups: Mapping[int, GroupConverter]) -> list[tuple[int, _data_plane.PagedConverter]]:
        return [(index, group.native) for index, group in groups.items()]

    def code(
        self, stream: PartStream, groups: Mapping[int, GroupConverter], on_event: Callable[[Event], None]
    ) -> PartCoder:
        self._streams[stream.id] = on_event
        return _InLanes(self._streams, stream)

    def encode(self, converter: GroupConverter, span: Span, wire: int, length: int, done: OnConverted) -> int:
        """Pages to wire bytes, in the background. Raises ValueError as GroupConverter does."""
        job = self.pool.encode(converter.native, tuple(span), wire, length)
        self._jobs[job] = (converter, done)
        return job

    def decode(self, converter: GroupConverter, span: Span, wire: int, length: int, done: OnConverted) -> int:
        """Wire bytes to pages, in the background. Raises ValueError as GroupConverter does."""
        job = self.pool.decode(converter.native, tuple(span), wire, length)
        self._jobs[job] = (converter, done)
        return job

    def attach(self, loop: ControlLoop) -> None:
        loop.watch(self, self._on_event)

    def cancel(self, job: int) -> None:
        """Forget a job: after this returns it touches no memory and ``done`` is not called."""
        known = self._jobs.pop(job, None)
        if known is not None:
            self.pool.cancel(job)

    def fileno(self) -> int:
        return self.pool.fileno()

    def poll(self) -> Sequence[Event]:
        return [Event._make(event) for event in self.pool.poll(POLLED_AT_ONCE)]

    def _on_event(self, event: Event) -> None:
        if event.kind != PoolEvent.CONVERTED:
            if (of_stream := self._streams.get(event.id)) is not None:
                of_stream(event)
        elif (known := self._jobs.pop(event.id, None)) is not None:
            known[1]("" if event.status == Status.OK else "the conversion was cancelled")

    @property
    def streams(self) -> int:
        """How many are being converted."""
        return len(self._streams)

    def counters(self) -> dict[str, int]:
        (encode_ns, encoded), (decode_ns, decoded) = self.pool.encoded, self.pool.decoded
        return {
            "encode_ns": encode_ns,
            "decode_ns": decode_ns,
            "encoded_wire_bytes": encoded,
            "decoded_wire_bytes": decoded,
            "staging_bytes": self.outgoing.in_use + self.incoming.in_use,
            "staging_limit_bytes": self.outgoing.capacity + self.incoming.capacity,
            "conversions": len(self._jobs) + len(self._streams),
        }

    def close(self) -> None:
        self.pool.close()
