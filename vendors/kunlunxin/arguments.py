# SPDX-License-Identifier: Apache-2.0
"""Arguments of kernels in a device's memory: what is longer than the driver takes by value."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from sage_kv_connector.devices.runtime import CopyKind, DeviceError, DeviceRuntime

#: By value: 128 words, which the second generation's driver has room for. Of newer ones no limit is public.
ARGUMENT_BYTES = 512
SLOT_BYTES, SLOTS = 4096, 64


class ArgumentRing:
    """Slots of a device that launches take turns in; it stays as long as the process, as kernels do.

    One thread at a time. Construction raises DeviceError.
    """

    def __init__(self, runtime: DeviceRuntime, device: int) -> None:
        self._runtime, self._device = runtime, device
        self._memory = runtime.alloc(device, SLOTS * SLOT_BYTES)
        self._pinned = runtime.host_alloc(device, SLOTS * SLOT_BYTES)
        self._used = [runtime.event_create(device) for _ in range(SLOTS)]
        self._turns = 0

    @contextlib.contextmanager
    def placed(self, argument: bytes, stream: int) -> Iterator[int]:
        """The address of the argument for a kernel that is launched inside, on the same stream.

        Waits where all slots belong to launches under way. Raises ValueError for a longer one than a slot, DeviceError.
        """
        if len(argument) > SLOT_BYTES:
            raise ValueError(f"a kernel's argument has {len(argument)} bytes, at most {SLOT_BYTES}")
        slot = self._turns % SLOTS
        if self._turns >= SLOTS:
            # What failed is another launch, and its own stream says so.
            with contextlib.suppress(DeviceError):
                self._runtime.event_synchronize(self._device, self._used[slot])
        self._turns += 1
        offset = slot * SLOT_BYTES
        address, pinned = self._memory + offset, self._pinned + offset
        ctypes.memmove(pinned, argument, len(argument))
        kind = CopyKind.HOST_TO_DEVICE
        self._runtime.copy_async(self._device, address, pinned, len(argument), kind, stream)
        try:
            yield address
        finally:
            self._runtime.event_record(self._device, self._used[slot], stream)
