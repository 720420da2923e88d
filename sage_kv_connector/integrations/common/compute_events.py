# SPDX-License-Identifier: Apache-2.0
"""What becomes final when a device has computed it: the engine's thread records an event and goes on.

A thread of ours waits for the events, in the order of the calls of ``behind``, and makes the calls that stand behind
them. An engine that recorded events itself hands them over; they are waited for in place of one of ours.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

logger = logging.getLogger(__name__)

#: Events that are there before the first is needed; more are made when so many are waited for at once.
READY_EVENTS = 64
#: A device that hangs keeps the thread; closing does not wait for it longer.
CLOSE_S = 5.0


class RecordedEvent(Protocol):
    """torch.Event, or what stands for it."""

    def synchronize(self) -> None:
        """Block, without the GIL, until what was on the stream is over. Raises what it failed with."""
        ...


class ComputeEvent(RecordedEvent, Protocol):
    """One of ours, to be used again and again."""

    def record(self) -> None:
        """On the calling thread's current stream."""
        ...


class _NotRecorded(NamedTuple):
    """What a device that is in trouble made of an event."""

    error: Exception

    def synchronize(self) -> None:
        raise self.error


class _Behind(NamedTuple):
    ours: ComputeEvent | None
    events: Sequence[RecordedEvent]
    call: Callable[[], object]
    failed: Callable[[str], object]


class ComputeEvents:
    """``behind`` on the engine's thread, whose calls are made on ours. ``make`` makes an event."""

    def __init__(self, make: Callable[[], ComputeEvent]) -> None:
        self._make = make
        self._free: deque[ComputeEvent] = deque()
        self._waiting: deque[_Behind] = deque()
        self._changed = threading.Condition()
        self._busy = self._closing = False
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="sage-kvt-computed", daemon=True
        )
        self._thread.start()
        ready.wait()

    def behind(
        self,
        call: Callable[[], object],
        failed: Callable[[str], object],
        recorded: Sequence[RecordedEvent] | None = None,
    ) -> None:
        """``call()`` when what this thread has launched so far is over, or ``failed`` with the device's error.

        A call that raises is followed by ``failed`` too, so that nobody waits for what does not come.

        ``recorded``: what to wait for instead, by the engine's own word; of none only the order of the calls is
        kept, and any thread may ask for it.
        """
        ours, events = None, recorded
        if events is None:
            try:
                ours = self._free.popleft() if self._free else self._make()
                ours.record()
                events = (ours,)
            except Exception as error:  # of a device in trouble hears who waits, not the engine's thread
                events = (_NotRecorded(error),)
        with self._changed:
            self._waiting.append(_Behind(ours, events, call, failed))
            self._changed.notify_all()

    def settle(self, timeout_s: float) -> bool:
        """Wait until everything so far is over; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def close(self) -> None:
        """No call is made any more once this returns, unless the device hangs. Idempotent."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    def _run(self, ready: threading.Event) -> None:
        try:
            self._free.extend(self._make() for _ in range(READY_EVENTS))
        finally:
            ready.set()
        while (one := self._next()) is not None:
            try:
                for event in one.events:
                    event.synchronize()
            except Exception as error:  # the vendor's, whatever its type
                self._after(one.failed, f"{type(error).__name__}: {error}")
            else:
                if one.ours is not None:
                    self._free.append(one.ours)
                if why := self._after(one.call):
                    self._after(one.failed, why)

    def _next(self) -> _Behind | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return None
            self._busy = True
            return self._waiting.popleft()

    def _after(self, call: Callable[..., object], *arguments: Any) -> str:
        """What the call failed with, "" if it did not."""
        if self._closing:
            return ""
        try:
            call(*arguments)
        except Exception as error:
            logger.exception("what stands behind a forward pass failed")
            return f"{type(error).__name__}: {error}"
        return ""
