# SPDX-License-Identifier: Apache-2.0
"""pcie over host memory beside an emulated device: connections, messages and host windows keep the contract.

What it does with the device's own memory is tested beside this module and by the engine's tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.backend import HOST, PcieBackend
from sage_kv_connector.backends.shm.backend import ShmBackend
from sage_kv_connector.devices.runtime import DeviceMemory
from tests.backends.kinds import Kind, Stranger, forge_native
from tests.backends.shm import kinds as shm
from tests.vendors.rig import Rig


@cache
def _device() -> DeviceMemory:
    """One emulated device a process, of the first vendor that can share its memory."""
    from sage_kv_connector.vendors import VENDORS

    for vendor in VENDORS:
        rig = Rig(vendor, memory_bytes=1 << 20)
        if rig.runtime.features.ipc:
            return DeviceMemory(rig.runtime, 0)
    raise AssertionError("no emulated vendor shares its memory")


def _make(**options: Any) -> PcieBackend:
    backend = PcieBackend(ShmBackend(**options))
    backend.attach_device(_device())
    return backend


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
        bounds=shm.BOUNDS,
        stranger=_stranger,
        envelope=_envelope,
        forge=_forge,
    ),
)
