# SPDX-License-Identifier: Apache-2.0
"""The accelerator that an engine's KV lies on, as the transport's own runtime sees it.

torch keeps the memory; we copy out of it and into it on streams of our own. What torch
launched must have ended before pages are read (``compute_events``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.devices.runtime import DeviceMemory, DeviceRuntime, RuntimeUnavailable
from sage_kv_connector.hardware.report.descriptors import (
    broken_vendors,
    torch_builds,
    torch_devices,
    vendors_of_torch_device,
)
from sage_kv_connector.integrations.common.compute_events import ComputeEvents
from sage_kv_connector.vendors import open_runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedDevice:
    """What torch calls a device, for engines that name it instead of handing its tensors over."""

    type: str
    index: int

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


def device_of(tensors: list[Any]) -> Any:
    """The torch device of all KV tensors; None for host memory.

    Raises ValueError when they lie on several devices, or on one that no runtime is known for.
    """
    devices = {(tensor.device.type, tensor.device.index): tensor.device for tensor in tensors}
    if len(devices) != 1:
        names = ", ".join(sorted(str(device) for device in devices.values()))
        raise ValueError(f"KV tensors lie on {names or 'nothing'}: must be one device")
    (device,) = devices.values()
    return _known(device)


def device_named(name: str, index: int) -> NamedDevice | None:
    """The device ``name`` ("cuda", "npu:3"; ``index`` if it has no number); None for host memory.

    Raises ValueError for one that no runtime is known for.
    """
    kind, _, number = name.partition(":")
    found: NamedDevice | None = _known(NamedDevice(kind, int(number) if number.isdecimal() else index))
    return found


def _known(device: Any) -> Any:
    if device.type == "cpu":
        return None
    if device.type not in torch_devices():
        said = "; ".join([f"allowed: cpu, {', '.join(torch_devices())}", *broken_vendors()])
        raise ValueError(f"KV lies on {device}; {said}")
    return device


def check_options(device: Any, config: KVTransportConfig) -> None:
    """Raises ValueError for options that only a cache in host memory (``device`` None) allows."""
    if device is not None and config.audit_file is not None:
        raise ValueError(
            f"audit_file is {str(config.audit_file)!r}, but KV lies on {device}: "
            "only host memory can be audited"
        )


def open_device(device: Any) -> DeviceMemory:
    """The vendor's runtime for a torch device. Raises RuntimeUnavailable saying what was tried."""
    errors = []
    for vendor in vendors_of_torch_device(device.type, _torch_build()):
        try:
            runtime: DeviceRuntime = open_runtime(vendor)
        except RuntimeUnavailable as error:
            errors.append(str(error))
            continue
        number = device.index or 0
        logger.info("KV lies on %s: %s, device %d", device, runtime.api, number)
        return DeviceMemory(runtime, number)
    raise RuntimeUnavailable(f"KV lies on {device}, and no vendor's library works: {'; '.join(errors)}")


class _TorchEvent:
    """Recorded on torch's current stream of the device."""

    def __init__(self, device: Any) -> None:
        import torch

        self._current_stream = torch.accelerator.current_stream
        self._device = torch.device(str(device))
        self._event = torch.Event(self._device, blocking=True)

    def record(self) -> None:
        self._event.record(self._current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


def compute_events(device: Any) -> ComputeEvents:
    """Of what torch launches on the device; its thread ends with ``close``."""
    return ComputeEvents(lambda: _TorchEvent(device))


def _torch_build() -> str | None:
    """Whose cards this torch was made for, where its device type does not tell."""
    import torch

    found = (build for build in torch_builds() if getattr(torch.version, build, None) is not None)
    return next(found, None)
