# SPDX-License-Identifier: Apache-2.0
"""pcie over host memory beside an emulated device: connections, messages and host windows keep the contract.

What it does with the device's own memory is tested beside this module and by the engine's tests.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

from sage_kv_connector.backends.base import Event
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.backend import HOST, PcieBackend
from sage_kv_connector.backends.shm.backend import ShmBackend
from sage_kv_connector.devices.runtime import DeviceMemory, DeviceRuntime
from tests.backends.kinds import Kind, Stranger, forge_native
from tests.backends.shm import kinds as shm
from tests.vendors.rig import Rig


class _OneProcess:
    """A runtime whose exported memory the exporting process may open, which no vendor's and no emulator's lets it."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._exported: dict[bytes, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def ipc_export(self, device: int, base: int, nbytes: int, importer: int) -> bytes:
        handle = base.to_bytes(8, "little")
        self._exported[handle] = base
        return handle

    def ipc_import(self, device: int, handle: bytes) -> int:
        return self._exported.get(handle, 0)  # another process's: only greeted with, never copied from

    def ipc_close(self, device: int, base: int) -> None:
        pass


@cache
def _device() -> DeviceMemory:
    """One emulated device a process, of any vendor."""
    from sage_kv_connector.vendors import VENDORS

    rig = Rig(next(iter(VENDORS)), memory_bytes=1 << 20)
    return DeviceMemory(cast(DeviceRuntime, _OneProcess(rig.runtime)), 0)


#: Events that the driving thread keeps for the test.
MOST_READY = 8


class Driven(PcieBackend):
    """With a thread that polls it, as the engine's control thread does: greetings are exchanged in ``poll``."""

    def __init__(self, inner: ShmBackend) -> None:
        super().__init__(inner)
        self._ready: deque[Event] = deque()
        self._told = threading.Condition()
        self._ending = False
        self._driver = threading.Thread(target=self._drive, daemon=True)
        self.attach_device(_device())
        self._driver.start()

    def _drive(self) -> None:
        while not self._ending:
            if super().wait(0.5):
                self._take()

    def _take(self) -> None:
        with self._told:  # no more than a few wait here: the bounds are those of the backend
            self._told.wait_for(lambda: len(self._ready) < MOST_READY or self._ending)
        events = super().poll(MOST_READY)
        with self._told:
            self._ready.extend(events)
            self._told.notify_all()

    def poll(self, max_events: int = 256) -> Sequence[Event]:
        with self._told:
            taken = [self._ready.popleft() for _ in range(min(max_events, len(self._ready)))]
            self._told.notify_all()
            return taken

    def wait(self, timeout_s: float) -> bool:
        with self._told:
            self._told.wait_for(lambda: bool(self._ready) or self._ending, timeout_s)
            return bool(self._ready)

    def close(self) -> None:
        with self._told:
            self._ending = True
            self._told.notify_all()
        self._wake_driver()
        self._driver.join()
        super().close()
        while events := super().poll():
            self._ready.extend(events)

    def _wake_driver(self) -> None:
        if not self._closed:
            self._wake_up()


def _make(**options: Any) -> PcieBackend:
    return Driven(ShmBackend(**options))


def _stranger(address: str) -> Stranger:
    return shm.stranger("shm://" + address.partition("@")[2])


def _envelope(length: int) -> int:
    return len(pm.encode(pm.Upper(bytes(length)))) - length


def _forge(descriptor: bytes, **changes: int) -> bytes:
    return HOST + forge_native(descriptor[1:], **changes)


KINDS = (
    Kind(
        "pcie-host",
        _make,
        "pcie://",
        "ipc",
        crosses_wire=False,
        bounds=shm.BOUNDS,
        stranger=_stranger,
        envelope=_envelope,
        forge=_forge,
    ),
)
