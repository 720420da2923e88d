# SPDX-License-Identifier: Apache-2.0
"""Conversion jobs of one engine: their threads, their staging memory, their completions.

Two arenas, one for each direction, so that an engine that both sends and receives can't
block itself. Control thread only, but for the pool's own threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Event, Status
from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.conversion.staging import StagingArena
from sage_kv_connector.engine.conversion.wire_plan import Formats, group_converter
from sage_kv_connector.format.converter import GroupConverter, Span

#: Ends of jobs that are taken from the pool's queue at once.
POLLED_AT_ONCE = 256

#: Called once when a job ended: why it failed, "" if it did not.
OnConverted = Callable[[str], None]


class JobEnded(NamedTuple):
    """Of a pool's or a lane's queue: a job, and why it failed ("" if it did not)."""

    job: int
    error: str
    time_ns: int


class Conversions(Protocol):
    """Jobs between pages and wire bytes, wherever the pages lie.

    ``outgoing`` and ``incoming`` are the memory that wire bytes wait in. A job ends in one call of
    ``done`` unless it is cancelled; after ``cancel`` returns it touches no memory. ``encode`` and
    ``decode`` take what ``group`` made, and raise ValueError as it does.
    """

    outgoing: StagingArena
    incoming: StagingArena

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

    def encode(self, group: Any, span: Span, wire: int, length: int, done: OnConverted) -> int: ...

    def decode(self, group: Any, span: Span, wire: int, length: int, done: OnConverted) -> int: ...

    def cancel(self, job: int) -> None: ...

    def counters(self) -> dict[str, int]: ...

    def close(self) -> None: ...


class CpuConversions:
    """Pages in host memory: the kernels run on a pool's threads."""

    group = staticmethod(group_converter)

    def __init__(self, threads: int, staging_bytes: int, register: Callable[[int, int], None]) -> None:
        self._pool = _data_plane.ConversionPool(threads)
        self.outgoing = StagingArena(staging_bytes, register)
        self.incoming = StagingArena(staging_bytes, register)
        # The pool works on the converter's memory: it is kept until the job is over.
        self._jobs: dict[int, tuple[GroupConverter, OnConverted]] = {}

    def encode(self, converter: GroupConverter, span: Span, wire: int, length: int, done: OnConverted) -> int:
        """Pages to wire bytes, in the background. Raises ValueError as GroupConverter does."""
        job = self._pool.encode(converter.native, tuple(span), wire, length)
        self._jobs[job] = (converter, done)
        return job

    def decode(self, converter: GroupConverter, span: Span, wire: int, length: int, done: OnConverted) -> int:
        """Wire bytes to pages, in the background. Raises ValueError as GroupConverter does."""
        job = self._pool.decode(converter.native, tuple(span), wire, length)
        self._jobs[job] = (converter, done)
        return job

    def attach(self, loop: ControlLoop) -> None:
        loop.watch(self, self._on_ended)

    def cancel(self, job: int) -> None:
        """Forget a job: after this returns it touches no memory and ``done`` is not called."""
        known = self._jobs.pop(job, None)
        if known is not None:
            self._pool.cancel(job)

    def fileno(self) -> int:
        return self._pool.fileno()

    def poll(self) -> Sequence[JobEnded]:
        events = map(Event._make, self._pool.poll(POLLED_AT_ONCE))
        return [
            JobEnded(
                event.id, "" if event.status == Status.OK else "the conversion was cancelled", event.time_ns
            )
            for event in events
        ]

    def _on_ended(self, ended: JobEnded) -> None:
        known = self._jobs.pop(ended.job, None)
        if known is not None:
            known[1](ended.error)

    def counters(self) -> dict[str, int]:
        return {
            "conversion_ns": self._pool.busy_ns,
            "converted_wire_bytes": self._pool.wire_bytes,
            "staging_bytes": self.outgoing.in_use + self.incoming.in_use,
            "conversions": len(self._jobs),
        }

    def close(self) -> None:
        self._pool.close()
