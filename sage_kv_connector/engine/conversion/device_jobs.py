# SPDX-License-Identifier: Apache-2.0
"""Conversion of KV that lies on a device.

Where the device has kernels, a job is one step of a lane: encode launches them from the pages
into a buffer on the device, whose bytes are the wire's, and copies these to the host; decode
copies, then launches. Elsewhere it has two steps that overlap with those of other jobs: encode is
a copy of pages to a pinned bounce (lane), then the CPU kernels (pool); decode is the pool, then a
copy to the device. A job holds its buffer or bounce only between its steps. A job that fails says
why; nothing of it stays. Control thread only, but for lanes and pool.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count

import numpy as np

from sage_kv_connector import _data_plane
from sage_kv_connector.backends.base import Event
from sage_kv_connector.contract.cache_view import GroupView
from sage_kv_connector.contract.schema import KVCacheSchema, Verdict
from sage_kv_connector.devices.dma_lane import DmaLane
from sage_kv_connector.devices.runtime import CopyKind, DeviceRuntime
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.conversion.bounce import (
    Bounce,
    DeviceGroup,
    bounce,
    bounce_bytes,
    copied_pages,
    device_group,
)
from sage_kv_connector.engine.conversion.device_kernels import DeviceKernels
from sage_kv_connector.engine.conversion.device_parts import DevicePartCoder
from sage_kv_connector.engine.conversion.device_rooms import DeviceRooms
from sage_kv_connector.engine.conversion.jobs import (
    CpuConversions,
    JobEnded,
    OnConverted,
    PartCoder,
    PartStream,
)
from sage_kv_connector.engine.conversion.peer_reads import PeerReads, runtime_lacks
from sage_kv_connector.engine.conversion.staging import Lease, StagingArena
from sage_kv_connector.engine.conversion.wire_plan import Formats, converted_planes
from sage_kv_connector.format.converter import Span
from sage_kv_connector.kernels.registry import GroupKernels


class _Job:
    """One box on its way; exactly one of its steps is under way at a time."""

    __slots__ = (
        "bounce",
        "done",
        "encode",
        "group",
        "kernels",
        "lease",
        "length",
        "on_lane",
        "pool_job",
        "span",
        "wire",
    )

    def __init__(
        self, group: DeviceGroup, span: Span, wire: int, length: int, done: OnConverted, *, encode: bool
    ) -> None:
        self.group, self.span = group, group.in_blocks(span)
        self.wire, self.length, self.done = wire, length, done
        self.encode = encode
        self.kernels: GroupKernels | None = None  #: what converts it; None: the CPU
        self.lease: Lease | None = None
        self.bounce: Bounce | None = None
        self.pool_job = 0
        self.on_lane = False


class DeviceConversions:
    """Construction raises DeviceError.

    ``device``: the runtime's number of the device that the pages lie on; ``kernels``: its own, or why it has none;
    ``whole_pages``: there are groups whose pages go as they are.
    """

    def __init__(
        self,
        runtime: DeviceRuntime,
        device: int,
        threads: int,
        staging_bytes: int,
        register: Callable[[int, int], None],
        kernels: DeviceKernels,
        *,
        whole_pages: bool = False,
    ) -> None:
        self._runtime, self._device, self._kernels = runtime, device, kernels
        reads = not runtime_lacks(runtime)
        self._rooms = DeviceRooms(runtime, device, staging_bytes, buffers=not kernels.lacks, reads=reads)
        if self._rooms.lacks:
            kernels.give_up(self._rooms.lacks)
        self.peer_reads = PeerReads(runtime, kernels, self._rooms.read_buffer)
        # Kernels' wire bytes, and whole pages, are copied from and to where they wait for the backend.
        pinned = whole_pages or not kernels.lacks
        self._cpu = CpuConversions(threads, staging_bytes, register, self._rooms.pinned if pinned else None)
        self.outgoing, self.incoming = self._cpu.outgoing, self._cpu.incoming
        self.pool = self._cpu.pool
        self._jobs: dict[int, _Job] = {}
        self._ids = count(1)
        self._copied: deque[JobEnded] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._from_device = DmaLane(runtime, device, CopyKind.DEVICE_TO_HOST, self._on_lane)
        self._to_device = DmaLane(runtime, device, CopyKind.HOST_TO_DEVICE, self._on_lane)

    def attach(self, loop: ControlLoop) -> None:
        self._cpu.attach(loop)
        loop.watch(self, self._on_copied)

    def group(
        self,
        view: GroupView,
        index: int,
        formats: Formats,
        local: KVCacheSchema,
        consumer: KVCacheSchema,
        producer: KVCacheSchema,
    ) -> DeviceGroup:
        """What ``encode`` and ``decode`` of this group take.

        Raises ValueError as ``converted_planes``, and for pages that go as they are to another cache.
        """
        if not (formats or view.canonical):
            if consumer.compare(producer).verdict is not Verdict.IDENTICAL:
                raise ValueError(f"pages of group {index} go as they are, to an equal cache only")
            return DeviceGroup(view, local.dtype, ())
        planes = converted_planes(view, index, formats, local, consumer, producer)
        group = device_group(view, local.dtype, planes)
        return group._replace(kernels=self._kernels.group(local.dtype, group.view, group.planes))

    def in_lanes(self, groups: Mapping[int, DeviceGroup]) -> list[tuple[int, _data_plane.PagedConverter]]:
        return []  # their pages are no memory of this process

    def code(
        self, stream: PartStream, groups: Mapping[int, DeviceGroup], on_event: Callable[[Event], None]
    ) -> PartCoder:
        convert = self.encode if isinstance(stream, _data_plane.PartEncoder) else self.decode
        asks = DevicePartCoder(stream, groups, convert, self.cancel, on_event)
        asks.inner = self._cpu.code(stream, {}, asks.on_event)
        return asks

    def encode(self, group: DeviceGroup, span: Span, wire: int, length: int, done: OnConverted) -> int:
        """Device pages to wire bytes, in the background. Raises ValueError for a box that has no room."""
        return self._begin(_Job(group, span, wire, length, done, encode=True))

    def decode(self, group: DeviceGroup, span: Span, wire: int, length: int, done: OnConverted) -> int:
        """Wire bytes to device pages, in the background. Raises ValueError for a box that has no room."""
        return self._begin(_Job(group, span, wire, length, done, encode=False))

    def cancel(self, job: int) -> None:
        """Forget a job: after this returns it touches no memory and ``done`` is not called."""
        known = self._jobs.pop(job, None)
        if known is None:
            return
        if known.on_lane:
            (self._from_device if known.encode else self._to_device).cancel(job)
        if known.pool_job:
            self._cpu.cancel(known.pool_job)
        self._give_back(known)

    def fileno(self) -> int:
        return self._wake

    def poll(self) -> Sequence[JobEnded]:
        os.eventfd_read(self._wake)
        return [self._copied.popleft() for _ in range(len(self._copied))]

    def counters(self) -> dict[str, int]:
        lanes = {"d2h": self._from_device, "h2d": self._to_device}
        cpu = self._cpu.counters()
        return cpu | {
            "staging_bytes": cpu["staging_bytes"] + self._rooms.in_use,
            "conversions": len(self._jobs) + self._cpu.streams,
            **{f"{name}_bytes": lane.bytes_copied for name, lane in lanes.items()},
            **{f"{name}_ns": lane.busy_ns for name, lane in lanes.items()},
            **{f"{name}_copies": lane.copies for name, lane in lanes.items()},
            **{f"{name}_jobs": lane.jobs for name, lane in lanes.items()},
            **{f"{name}_launches": lane.launches for name, lane in lanes.items()},
        }

    def close(self) -> None:
        self._from_device.close()
        self._to_device.close()
        self._cpu.close()
        self._rooms.close()
        os.close(self._wake)

    # -- inside

    def _on_copied(self, ended: JobEnded) -> None:
        """A lane's step of a job ended."""
        job = self._jobs.get(ended.job)
        if job is None:
            return
        job.on_lane = False
        if ended.error or not job.encode or job.kernels is not None or not job.group.planes:
            self._end(ended.job, ended.error)
        else:
            self._on_pool(ended.job, job)

    def _arena_of(self, job: _Job) -> StagingArena:
        return self._rooms.arena(encode=job.encode, on_device=job.kernels is not None)

    def _begin(self, job: _Job) -> int:
        job_id = next(self._ids)
        self._jobs[job_id] = job

        def placed(lease: Lease) -> None:
            if job_id not in self._jobs:
                return
            job.lease = lease
            try:
                if job.kernels is not None:
                    self._launch(job_id, job, job.kernels, lease.address)
                    return
                job.bounce = bounce(job.group, job.span, lease.address)
            except ValueError as error:
                self._end(job_id, str(error))
                return
            if job.encode:
                self._on_lane_of(self._from_device, job_id, job)
            else:
                self._on_pool(job_id, job)

        if not job.group.planes:
            self._copy(job_id, job)
            return job_id
        if job.length <= self._rooms.buffer_bytes:
            job.kernels = job.group.kernels
        nbytes = job.length if job.kernels is not None else bounce_bytes(job.group, job.span)
        try:
            job.lease = self._arena_of(job).request(nbytes, placed)
        except ValueError:
            self._jobs.pop(job_id, None)
            raise
        return job_id

    def _copy(self, job_id: int, job: _Job) -> None:
        """Whole pages, straight to or from where they wait."""
        try:
            pages = copied_pages(job.group, job.span, job.wire, job.length)
        except ValueError:
            self._jobs.pop(job_id)
            raise
        job.on_lane = True
        lane = self._from_device if job.encode else self._to_device
        lane.submit(job_id, np.ascontiguousarray(pages[:, [1, 0, 2]]) if job.encode else pages)

    def _launch(self, job_id: int, job: _Job, kernels: GroupKernels, buffer: int) -> None:
        job.on_lane = True
        ends = (job.wire, buffer) if job.encode else (buffer, job.wire)
        copies = np.array([(*ends, job.length)], dtype=np.uint64)
        launches = kernels.launches("encode" if job.encode else "decode", job.span, buffer, job.length)
        lane = self._from_device if job.encode else self._to_device
        lane.submit(job_id, copies, launches)

    def _on_lane_of(self, lane: DmaLane, job_id: int, job: _Job) -> None:
        assert job.bounce is not None
        job.on_lane = True
        lane.submit(job_id, job.bounce.to_host() if job.encode else job.bounce.to_device())

    def _on_pool(self, job_id: int, job: _Job) -> None:
        assert job.bounce is not None
        convert = self._cpu.encode if job.encode else self._cpu.decode
        try:
            job.pool_job = convert(
                job.bounce.converter,
                job.bounce.span,
                job.wire,
                job.length,
                lambda error: self._off_pool(job_id, error),
            )
        except ValueError as error:
            self._end(job_id, str(error))

    def _off_pool(self, job_id: int, error: str) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        job.pool_job = 0
        if error or job.encode:
            self._end(job_id, error)
        else:
            self._on_lane_of(self._to_device, job_id, job)

    def _end(self, job_id: int, error: str) -> None:
        job = self._jobs.pop(job_id)
        self._give_back(job)
        job.done(error)

    def _give_back(self, job: _Job) -> None:
        if job.lease is not None:
            self._arena_of(job).release(job.lease)

    def _on_lane(self, job_id: int, error: str) -> None:
        self._copied.append(JobEnded(job_id, error, time.monotonic_ns()))
        os.eventfd_write(self._wake, 1)
