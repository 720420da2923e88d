# SPDX-License-Identifier: Apache-2.0
"""Backends whose windows and posts may lie on one device."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from sage_kv_connector.devices.runtime import DeviceMemory


@runtime_checkable
class DeviceBackend(Protocol):
    """What a Backend with ``device_memory`` has beside: windows and posts may lie on one device."""

    def attach_device(self, device: DeviceMemory) -> None:
        """Before ``listen`` and ``connect``. Raises DeviceError."""
        ...

    def register_device_memory(self, address: int, length: int) -> None:
        """Make device memory usable in posts and windows, until ``close``; peers may still find no way to it."""
        ...
