# SPDX-License-Identifier: Apache-2.0
"""Memory that boxes of a device's pages wait in between their steps: pinned bounces, and buffers on the device."""

from __future__ import annotations

from sage_kv_connector.devices.runtime import DeviceError, DeviceRuntime
from sage_kv_connector.engine.conversion.staging import LARGEST_PART_BYTES, StagingArena

#: As many parts lie in the buffers of one direction at a time.
BUFFERED_PARTS = 4
#: Of the one buffer that parts pass on their way from a peer's pages to ours: kernels of one stream use it in turn.
READ_BYTES = LARGEST_PART_BYTES
#: Of the device's memory is left to the engine's own needs, and to those of a backend that opens peers' memory.
LEFT_BYTES = 64 << 20


class DeviceRooms:
    """Arenas by direction, for boxes on their way off the device and onto it. Control thread only.

    Buffers are taken at construction, since an engine leaves little of its device's memory; ``lacks`` says why there
    are none, "" where there are. ``read_buffer``: of ``READ_BYTES``, for parts that are read from a peer's memory; 0
    where there is none. Pinned memory is taken when it is first used.
    """

    def __init__(
        self, runtime: DeviceRuntime, device: int, staging_bytes: int, *, buffers: bool, reads: bool = False
    ) -> None:
        self._runtime, self._device = runtime, device
        self._pinned: list[int] = []
        self._on_device: list[int] = []
        self.buffer_bytes = min(staging_bytes, BUFFERED_PARTS * LARGEST_PART_BYTES) if buffers else 0
        self._bounces = tuple(StagingArena(staging_bytes, _nowhere, self.pinned) for _ in range(2))
        self.lacks = self._take_buffers() if buffers else ""
        if self.lacks:
            self.buffer_bytes = 0
        self._buffers = tuple(self._buffer(address) for address in self._on_device)
        self.read_buffer = self._take_read_buffer() if reads and self._buffers else 0

    @property
    def in_use(self) -> int:
        return sum(arena.in_use for arena in (*self._bounces, *self._buffers))

    def pinned(self, nbytes: int) -> int:
        """Page-aligned host memory until ``close``. Raises ValueError where there is none."""
        try:
            address = self._runtime.host_alloc(self._device, nbytes)
        except DeviceError as error:
            raise ValueError(f"no pinned host memory (option staging_bytes): {error}") from error
        self._pinned.append(address)
        return address

    def arena(self, *, encode: bool, on_device: bool) -> StagingArena:
        return (self._buffers if on_device else self._bounces)[int(not encode)]

    def close(self) -> None:
        """Once, when nothing is on a stream any more."""
        for address in self._pinned:
            self._runtime.host_free(self._device, address)
        for address in self._on_device:
            self._runtime.free(self._device, address)

    def _take_buffers(self) -> str:
        wanted = 2 * self.buffer_bytes
        try:
            if self._runtime.features.memory_info:
                free, _ = self._runtime.memory_info(self._device)
                if free < wanted + LEFT_BYTES:
                    return f"{free} bytes of the device are free, buffers take {wanted} and {LEFT_BYTES} must be left"
            for _ in range(2):
                self._on_device.append(self._runtime.alloc(self._device, self.buffer_bytes))
        except DeviceError as error:
            for address in self._on_device:
                self._runtime.free(self._device, address)
            self._on_device.clear()
            return f"no room on the device for buffers of {self.buffer_bytes} bytes: {error}"
        return ""

    def _take_read_buffer(self) -> int:
        try:
            address = self._runtime.alloc(self._device, READ_BYTES)
        except DeviceError:
            return 0
        self._on_device.append(address)
        return address

    def _buffer(self, address: int) -> StagingArena:
        return StagingArena(self.buffer_bytes, _nowhere, lambda _: address)


def _nowhere(address: int, nbytes: int) -> None:
    """No backend knows this memory: it is read and written by this process and its device alone."""
