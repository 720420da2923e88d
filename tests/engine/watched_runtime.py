# SPDX-License-Identifier: Apache-2.0
"""A device's runtime that notes what an engine's own thread asks of it, and torch's event over it."""

from __future__ import annotations

import threading
from typing import Any

from sage_kv_connector.devices.runtime import DeviceRuntime


class Watched:
    """A runtime that notes what is called on the thread that made it, from ``begin`` on: a start may wait."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        self.unwatched, self._thread = runtime, threading.get_ident()
        self.called: list[str] = []
        self._watches = False

    def begin(self) -> None:
        self._watches = True

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.unwatched, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            if self._watches and threading.get_ident() == self._thread:
                assert "synchronize" not in name, "the engine's thread waits for the device"
                self.called.append(name)
            return found(*arguments, **named)

        return call


class Event:
    """As torch's, over the runtime."""

    def __init__(self, runtime: Any, stream: int) -> None:
        self._runtime, self._stream = runtime, stream
        self._event = runtime.event_create(0)

    def record(self) -> None:
        self._runtime.event_record(0, self._event, self._stream)

    def synchronize(self) -> None:
        self._runtime.event_synchronize(0, self._event)


class EnginesEvent(Event):
    """One that the engine makes and records itself, which is no call of ours; to wait for it is."""

    def __init__(self, watched: Watched, stream: int) -> None:
        super().__init__(watched.unwatched, stream)
        self.record()
        self._runtime = watched
