# SPDX-License-Identifier: Apache-2.0
"""A thread and a stream that copy one way between a device and pinned host memory, and launch what belongs to it.

Two jobs are on the stream at a time: while one is copied the next is enqueued, so that the
copy engine never waits for this thread, nor the control thread for the device. A lane
sleeps while it has nothing to do; it blocks in the runtime, without the GIL, while it has.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sage_kv_connector.devices.runtime import Copies, CopyKind, DeviceError, DeviceRuntime, Launch

#: Jobs on the stream at a time (double buffering).
DEPTH = 2

#: Called from the lane's thread once for each job: its id, and why it failed ("" if it did not).
OnCopied = Callable[[int, str], None]


class _Job(NamedTuple):
    id: int
    copies: Copies
    launches: Sequence[Launch]


class DmaLane:
    """Copies of one direction. ``submit`` and ``cancel`` from any thread."""

    def __init__(self, runtime: DeviceRuntime, device: int, kind: CopyKind, on_copied: OnCopied) -> None:
        self._runtime, self._device, self._kind = runtime, device, kind
        self._on_copied = on_copied
        self._stream = runtime.stream_create(device)
        self._events = [runtime.event_create(device) for _ in range(DEPTH)]
        self._waiting: deque[_Job] = deque()
        self._running: set[int] = set()
        self._changed = threading.Condition()
        self._closing = False
        self.bytes_copied = 0
        self.busy_ns = 0  #: time with at least one job on the stream
        self.copies = 0
        self.jobs = 0
        self.launches = 0
        self._since = 0
        self._failed = False
        name = f"sage-kvt-{kind.name.lower().replace('_', '-')}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: int, copies: Copies, launches: Sequence[Launch] = ()) -> None:
        """``launches`` run before copies from the device, behind copies to it; there may be no copies."""
        with self._changed:
            self._waiting.append(_Job(job, copies, launches))
            self._changed.notify_all()

    def cancel(self, job: int) -> None:
        """After this returns the job's memory is left alone: it is not begun, or it is waited for."""
        with self._changed:
            for waiting in self._waiting:
                if waiting.id == job:
                    self._waiting.remove(waiting)
                    return
            while job in self._running:
                self._changed.wait()

    def close(self) -> None:
        """End the thread after what is on the stream; give stream and events back. Idempotent."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()
        for event in self._events:
            self._runtime.event_destroy(self._device, event)
        self._runtime.stream_destroy(self._device, self._stream)

    # -- the thread

    def _run(self) -> None:
        on_stream: deque[tuple[_Job, int]] = deque()
        free = deque(self._events)
        while True:
            if self._failed and not on_stream:
                self._renew()
                free = deque(self._events)
            may_take = len(on_stream) < DEPTH and not self._failed
            job = self._next(block=not on_stream) if may_take else None
            if job is not None:
                begun = time.monotonic_ns()
                try:
                    self._enqueue(job)
                    self._runtime.event_record(self._device, free[0], self._stream)
                except (DeviceError, ValueError) as error:
                    self._drain()  # some of its copies may be on the stream already
                    self._failed = True
                    self._ended(job, str(error))
                    continue
                if not on_stream:
                    self._since = begun
                on_stream.append((job, free.popleft()))
            elif on_stream:
                done, event = on_stream.popleft()
                failure = self._wait(event)
                free.append(event)
                self._failed = self._failed or failure != ""
                self._count(done, failure)
                self._ended(done, failure)
            else:
                return

    def _enqueue(self, job: _Job) -> None:
        runtime, device, stream = self._runtime, self._device, self._stream
        if self._kind == CopyKind.HOST_TO_DEVICE and len(job.copies):
            runtime.copy_batch_async(device, job.copies, self._kind, stream)
        for launch in job.launches:
            runtime.launch(device, launch, stream)
        if self._kind != CopyKind.HOST_TO_DEVICE and len(job.copies):
            runtime.copy_batch_async(device, job.copies, self._kind, stream)

    def _next(self, *, block: bool) -> _Job | None:
        with self._changed:
            while block and not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return None
            job = self._waiting.popleft()
            self._running.add(job.id)
            return job

    def _wait(self, event: int) -> str:
        try:
            self._runtime.event_synchronize(self._device, event)
        except DeviceError as error:
            return str(error)
        return ""

    def _renew(self) -> None:
        """A stream that failed stays failed: take another. On a lost device jobs go on to fail by name."""
        self._failed = False
        try:
            stream = self._runtime.stream_create(self._device)
        except DeviceError:
            return
        old, self._stream = self._stream, stream
        self._runtime.stream_destroy(self._device, old)
        with contextlib.suppress(DeviceError):
            for index, event in enumerate(self._events):
                self._events[index] = self._runtime.event_create(self._device)
                self._runtime.event_destroy(self._device, event)

    def _drain(self) -> None:
        try:
            self._runtime.stream_synchronize(self._device, self._stream)
        except DeviceError:
            return  # the job that it belongs to is told by its own event

    def _count(self, job: _Job, error: str) -> None:
        now = time.monotonic_ns()
        self.busy_ns += now - self._since
        self._since = now
        self.copies += len(job.copies)
        self.jobs += 1
        self.launches += len(job.launches)
        if not error:
            self.bytes_copied += int(job.copies[:, 2].sum())

    def _ended(self, job: _Job, error: str) -> None:
        with self._changed:
            self._running.discard(job.id)
            self._changed.notify_all()
        self._on_copied(job.id, error)
