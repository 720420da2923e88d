# SPDX-License-Identifier: Apache-2.0
"""Backends whose windows and posts may lie on a device, or be read there (``Capabilities.device_memory``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from sage_kv_connector.backends.base import Descriptors
from sage_kv_connector.devices.runtime import DeviceMemory, Launch

#: Of ``open_read_window``: gets rows of uint64 (n, 3), address here, offset in the window, bytes, that a peer offered,
#: and returns the launches that can begin with them, those of one job together. Raises ValueError for what it can't
#: read.
Read = Callable[[Descriptors], list[Sequence[Launch]]]


@runtime_checkable
class DeviceBackend(Protocol):
    """What a Backend with ``device_memory`` has beside: windows and posts may lie on one device."""

    def attach_device(self, device: DeviceMemory) -> None:
        """Before ``listen`` and ``connect``. Raises DeviceError."""
        ...

    def register_device_memory(self, address: int, length: int) -> None:
        """Make device memory usable in posts and windows, until ``close``; peers may still find no way to it."""
        ...

    def open_read_window(self, connection: int, nbytes: int, generation: int, read: Read) -> int:
        """Let kernels of the device fill a window of ``nbytes`` from the peer's memory, in place; returns a window id.

        ``read`` is called by ``poll``, each byte is offered once. Events and ``close_window`` are as of
        ``open_window``; what ``read`` refuses fails the window with NOT_CONVERTED.
        """
        ...
