# SPDX-License-Identifier: Apache-2.0
"""pcie beside an emulated device: connections, messages and windows over host memory, and windows over the device's."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, cast

from sage_kv_connector.backends.base import Backend, Event
from sage_kv_connector.backends.device_backend import DeviceBackend
from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.backend import DEVICE, PcieBackend
from sage_kv_connector.backends.pcie.host_half import HOST
from sage_kv_connector.backends.shm.backend import ShmBackend
from sage_kv_connector.devices.runtime import CopyKind, DeviceMemory, DeviceRuntime
from tests.backends.kinds import Kind, Stranger, forge_native
from tests.backends.places import Bytes
from tests.backends.shm import kinds as shm
from tests.vendors.rig import D2H, H2D, Rig


class _AlsoOneProcess:
    """A runtime whose exported memory the exporting process may open, which no vendor's and no emulator's lets it."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._own: dict[bytes, int] = {}
        self._process = runtime.ipc_process_id(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def ipc_export(self, device: int, base: int, nbytes: int, importer: int) -> bytes:
        if importer != self._process:
            return self._runtime.ipc_export(device, base, nbytes, importer)
        handle = b"own" + base.to_bytes(8, "little")
        self._own[handle] = base
        return handle

    def ipc_import(self, device: int, handle: bytes) -> int:
        base = self._own.get(handle)
        return self._runtime.ipc_import(device, handle) if base is None else base

    def ipc_close(self, device: int, base: int) -> None:
        if base not in self._own.values():
            self._runtime.ipc_close(device, base)


@cache
def _rig() -> Rig:
    """One emulated node a process, of any vendor."""
    from sage_kv_connector.vendors import VENDORS

    return Rig(next(iter(VENDORS)), memory_bytes=1 << 30)


@cache
def _device() -> DeviceMemory:
    return DeviceMemory(cast(DeviceRuntime, _AlsoOneProcess(_rig().runtime)), 0)


class _OnDevice:
    """Memory of the emulated device; it stays registered until the backend is closed."""

    def allocate(self, here: Bytes) -> int:
        return _rig().runtime.alloc(0, here.nbytes)

    def free(self, there: int) -> None:
        _rig().runtime.free(0, there)

    def register(self, backend: Backend, address: int, length: int) -> int:
        cast(DeviceBackend, backend).register_device_memory(address, length)
        return 0

    def deregister(self, backend: Backend, region: int) -> None:
        pass

    def store(self, there: int, here: Bytes) -> None:
        self._copy(there, here.ctypes.data, here.nbytes, H2D)

    def load(self, there: int, here: Bytes) -> None:
        self._copy(here.ctypes.data, there, here.nbytes, D2H)

    def _copy(self, destination: int, source: int, nbytes: int, kind: CopyKind) -> None:
        runtime = _rig().runtime
        stream = runtime.stream_create(0)
        runtime.copy_async(0, destination, source, nbytes, kind, stream)
        runtime.stream_synchronize(0, stream)
        runtime.stream_destroy(0, stream)


#: Events that the driving thread keeps for the test.
MOST_READY = 8


class Driven(PcieBackend):
    """With a thread that polls it, as the engine's control thread does: greetings are exchanged in ``poll``."""

    def __init__(self, inner: ShmBackend) -> None:
        super().__init__(inner)
        self._ready: deque[Event] = deque()
        self._some = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable while `_ready` is not empty
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
            if events and not self._ready:
                os.eventfd_write(self._some, 1)
            self._ready.extend(events)
            self._told.notify_all()

    def poll(self, max_events: int = 256) -> Sequence[Event]:
        with self._told:
            taken = [self._ready.popleft() for _ in range(min(max_events, len(self._ready)))]
            if taken and not self._ready and not self._ending:
                os.eventfd_read(self._some)
            self._told.notify_all()
            return taken

    def fileno(self) -> int:
        return -1 if self._ending else self._some

    def wait(self, timeout_s: float) -> bool:
        with self._told:
            self._told.wait_for(lambda: bool(self._ready) or self._ending, timeout_s)
            return bool(self._ready)

    def close(self) -> None:
        with self._told:
            first, self._ending = not self._ending, True
            self._told.notify_all()
        self._wake_driver()
        self._driver.join()
        if first:
            os.close(self._some)
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


def _forge_device(descriptor: bytes, *, window: int | None = None, size: int = 0) -> bytes:
    """The descriptor of a device window names the window alone."""
    return descriptor if window is None else DEVICE + window.to_bytes(8, "little")


_kind = partial(
    Kind,
    make=_make,
    listen_on="pcie://",
    mode="ipc",
    crosses_wire=False,
    bounds=shm.BOUNDS,
    stranger=_stranger,
    envelope=_envelope,
)
KINDS = (
    _kind("pcie-host", forge=_forge),
    _kind("pcie-device", forge=_forge_device, memory=_OnDevice(), quiet_when_closing=False),
)
