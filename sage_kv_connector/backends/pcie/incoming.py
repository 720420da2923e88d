# SPDX-License-Identifier: Apache-2.0
"""The receiver's half: windows over device memory, and the copies that a lane makes into them.

A peer offers ranges of its allocations for a window; the device copies them (one job an offer), or its kernels read
them where they lie, and the peer is told how that ended. Called with the backend's events by ``poll``'s thread, but for
windows, which any thread opens and closes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from sage_kv_connector.backends.base import EventKind, Segments, Status
from sage_kv_connector.backends.device_backend import Read
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.ipc_memory import IpcMemory
from sage_kv_connector.backends.pcie.window_copies import DeviceWindow
from sage_kv_connector.backends.pcie.window_copies import Incoming as Rows
from sage_kv_connector.backends.pcie.window_reads import CannotRead, ReadWindow
from sage_kv_connector.devices.dma_lane import DmaLane
from sage_kv_connector.devices.runtime import CopyKind, DeviceError

#: ``emit(kind, connection, id, status, length, detail)`` makes an event of the backend.
Emit = Callable[[EventKind, int, int, Status, int, str], None]
#: ``tell(connection, message)`` sends, if the connection still stands.
Tell = Callable[[int, pm.Message], None]
NO_COPIES = np.zeros((0, 3), dtype=np.uint64)


class _Copy:
    """One offer that the lane works on."""

    __slots__ = ("connection", "nbytes", "part", "post", "revoked", "window")

    def __init__(self, connection: int, offer: pm.Offered, nbytes: int) -> None:
        self.connection, self.window = connection, offer.window
        self.post, self.part, self.nbytes = offer.post, offer.part, nbytes
        self.revoked = False


class _Reading(NamedTuple):
    """Launches of a read window that the lane works on."""

    connection: int
    window: int


class Incoming:
    """``wake`` is called from the lane's thread: ``take_copied`` has something to do."""

    def __init__(
        self, memory: IpcMemory, ids: Iterator[int], emit: Emit, tell: Tell, wake: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._ids = ids
        self._emit, self._tell, self._wake = emit, tell, wake
        #: Held where copies begin and end; the lane's thread never takes it, so they can be waited for under it.
        self._lock = threading.RLock()
        self._windows: dict[int, DeviceWindow | ReadWindow] = {}
        self._copies: dict[int, _Copy | _Reading] = {}
        self._copied: deque[tuple[int, str]] = deque()
        #: Jobs of launches that ended well, and bytes of the windows that they filled.
        self.reads = self.read_bytes = 0
        self.lane = DmaLane(memory.runtime, memory.device, CopyKind.DEVICE_TO_DEVICE, self._on_lane)

    def __len__(self) -> int:
        return len(self._copies)

    def open_window(self, connection: int, segments: Segments, generation: int) -> int:
        """Raises ValueError for generation 0 and for a segment without bytes."""
        if generation == 0:
            raise ValueError("generation must not be 0")
        if (empty := np.flatnonzero(segments[:, 1] == 0)).size:
            raise ValueError(f"segment {empty[0]} has length 0")
        window = next(self._ids)
        with self._lock:
            self._windows[window] = DeviceWindow(connection, segments, generation)
        return window

    def open_read_window(self, connection: int, nbytes: int, generation: int, read: Read) -> int:
        """Raises ValueError for generation 0 and for no bytes."""
        if generation == 0 or nbytes <= 0:
            raise ValueError(f"generation is {generation}, nbytes {nbytes}: neither may be 0")
        window = next(self._ids)
        with self._lock:
            self._windows[window] = ReadWindow(connection, nbytes, generation, read)
        return window

    def close_window(self, window: int) -> int:
        """Returns how many bytes had landed; nothing writes into the window any more."""
        with self._lock:
            known = self._windows.pop(window, None)
            if known is None:
                return 0
            for job in list(known.jobs):
                self._cancel(job, Status.CANCELLED, "the window was closed")
            if isinstance(known, ReadWindow):
                known.jobs.clear()
                known.revoked = True  # what was not answered is not wanted
                self._answer_all(known)
            return known.landed

    def on_offered(self, connection: int, offer: pm.Offered) -> None:
        """Begin to copy. Raises PcieProtocolError for rows that leave their allocation."""
        with self._lock:
            self._offered(connection, offer)

    def _offered(self, connection: int, offer: pm.Offered) -> None:
        window = self._windows.get(offer.window)
        if window is None or window.connection != connection or window.ended:
            self._answer(connection, offer, Status.CANCELLED, "the window is closed")
            return
        if window.generation != offer.generation:
            self._answer(connection, offer, Status.STALE_GENERATION, "")
            return
        rows = pm.rows_of(offer)
        try:
            bases = self._memory.opened(connection, offer.handles)
            incoming = np.empty((len(rows), 3), dtype=np.uint64)
            incoming[:, 0] = np.asarray(bases, dtype=np.uint64)[rows[:, 0].astype(np.int64)] + rows[:, 1]
            incoming[:, 1:] = rows[:, 2:]
            if isinstance(window, ReadWindow):
                self._launch(offer, window, incoming)
                return
            copies = window.copies(incoming)
        except (DeviceError, ValueError) as error:
            status = Status.IO_ERROR if isinstance(error, DeviceError) else Status.OUT_OF_BOUNDS
            self._window_failed(offer.window, status, str(error))
            self._answer(connection, offer, status, str(error))
            return
        job = next(self._ids)
        self._copies[job] = _Copy(connection, offer, int(rows[:, 3].sum()))
        window.jobs.add(job)
        self.lane.submit(job, copies)

    def _launch(self, offer: pm.Offered, window: ReadWindow, incoming: Rows) -> None:
        try:
            for launches in window.works(offer, incoming):
                job = next(self._ids)
                self._copies[job] = _Reading(window.connection, offer.window)
                window.jobs.add(job)
                self.lane.submit(job, NO_COPIES, launches)
        except ValueError as error:
            status = Status.NOT_CONVERTED if isinstance(error, CannotRead) else Status.OUT_OF_BOUNDS
            self._window_failed(offer.window, status, str(error))
        self._settle(offer.window, window)

    def _settle(self, number: int, window: ReadWindow) -> None:
        """Answer what a read window was offered, once nothing of it is read any more and nothing more is to come."""
        if window.jobs or not (window.ended or window.revoked or window.complete):
            return
        if not (window.ended or window.revoked):
            window.ended = True
            self.read_bytes += window.size
            self._emit(EventKind.WINDOW_DONE, window.connection, number, Status.OK, window.size, "")
        self._answer_all(window)

    def _answer_all(self, window: ReadWindow) -> None:
        for offer, status, detail in window.answers():
            self._answer(window.connection, offer, status, detail)

    def on_revoked(self, connection: int, post: int) -> None:
        """The sender took a post back: what still lands of it does not count."""
        with self._lock:
            for copy in self._copies.values():
                if isinstance(copy, _Copy) and copy.post == post and copy.connection == connection:
                    copy.revoked = True
            for number, window in self._windows.items():
                if isinstance(window, ReadWindow) and window.connection == connection and window.holds(post):
                    window.revoked = True
                    self._settle(number, window)

    def on_lost(self, connection: int, detail: str) -> None:
        """After this no copy of the connection is under way."""
        with self._lock:
            for job in [job for job, copy in self._copies.items() if copy.connection == connection]:
                self._cancel(job, Status.CONNECTION_LOST, "")
            for window in [
                window for window, known in self._windows.items() if known.connection == connection
            ]:
                self._window_failed(window, Status.CONNECTION_LOST, detail)

    def take_copied(self) -> None:
        """What the lane finished since the last call."""
        while self._copied:
            job, error = self._copied.popleft()
            with self._lock:
                copy = self._copies.pop(job, None)
                if copy is not None:
                    self._landed(job, copy, error)

    def counters(self) -> dict[str, int]:
        lane = self.lane
        return {
            "d2d_bytes": lane.bytes_copied,
            "d2d_ns": lane.busy_ns,
            "d2d_launches": lane.launches,
            "d2d_reads": self.reads,
            "d2d_read_bytes": self.read_bytes,
            "device_offers": len(self),
        }

    def close(self) -> None:
        self.lane.close()

    def _landed(self, job: int, copy: _Copy | _Reading, error: str) -> None:
        window = self._windows.get(copy.window)
        if window is not None:
            window.jobs.discard(job)
        if error:
            self._window_failed(copy.window, Status.IO_ERROR, error)
        if isinstance(copy, _Reading):
            self.reads += not error
            if isinstance(window, ReadWindow):
                self._settle(copy.window, window)
            return
        assert not isinstance(window, ReadWindow)
        if not error and window is not None and not window.ended and not copy.revoked:
            window.landed += copy.nbytes
            if window.landed == window.size:
                window.ended = True
                self._emit(EventKind.WINDOW_DONE, copy.connection, copy.window, Status.OK, window.size, "")
        status = Status.IO_ERROR if error else Status.CANCELLED if copy.revoked else Status.OK
        self._answer(copy.connection, copy, status, error)

    def _cancel(self, job: int, status: Status, detail: str) -> None:
        """Wait for it or take it off the lane; the sender is told."""
        copy = self._copies.pop(job, None)
        if copy is None:
            return
        self.lane.cancel(job)
        if status != Status.CONNECTION_LOST and isinstance(copy, _Copy):
            self._answer(copy.connection, copy, status, detail)

    def _answer(self, connection: int, offered: pm.Offered | _Copy, status: Status, detail: str) -> None:
        """Tell the sender how one offer ended."""
        self._tell(connection, pm.Taken(offered.post, offered.part, status, detail[: pm.MAX_DETAIL]))

    def _window_failed(self, window: int, status: Status, detail: str) -> None:
        known = self._windows.get(window)
        if known is not None and not known.ended:
            known.ended = True
            if isinstance(known, ReadWindow):
                known.status, known.detail = status, detail
            self._emit(EventKind.WINDOW_FAILED, known.connection, window, status, 0, detail)

    def _on_lane(self, job: int, error: str) -> None:
        self._copied.append((job, error))
        self._wake()
