# SPDX-License-Identifier: Apache-2.0
"""The accelerator that vLLM's KV tensors lie on, as the transport's own runtime sees it.

torch keeps the memory; we copy out of it and into it on streams of our own. What torch
launched must have ended before pages are read (``wait_for_compute``).
"""

from __future__ import annotations

import logging
from typing import Any

from sage_kv_connector.devices.runtime import DeviceMemory, DeviceRuntime, RuntimeUnavailable
from sage_kv_connector.vendors import open_runtime

logger = logging.getLogger(__name__)

#: torch's device type → vendors to try, in order. Hygon's and Kunlunxin's torch call their cards "cuda".
VENDORS_OF = {
    "cuda": ("nvidia", "hygon", "kunlunxin"),
    "npu": ("ascend",),
    "mlu": ("cambricon",),
    "xpu": ("kunlunxin",),
}


def device_of(tensors: list[Any]) -> Any:
    """The torch device of all KV tensors; None for host memory.

    Raises ValueError when they lie on several devices, or on one that no runtime is known for.
    """
    devices = {(tensor.device.type, tensor.device.index): tensor.device for tensor in tensors}
    if len(devices) != 1:
        names = ", ".join(sorted(str(device) for device in devices.values()))
        raise ValueError(f"KV tensors lie on {names or 'nothing'}: must be one device")
    (device,) = devices.values()
    if device.type == "cpu":
        return None
    if device.type not in VENDORS_OF:
        raise ValueError(f"KV tensors lie on {device}; allowed: cpu, {', '.join(VENDORS_OF)}")
    return device


def open_device(device: Any) -> DeviceMemory:
    """The vendor's runtime for a torch device. Raises RuntimeUnavailable saying what was tried."""
    errors = []
    vendors = VENDORS_OF[device.type]
    if device.type == "cuda" and _is_hip():
        vendors = ("hygon",)
    for vendor in vendors:
        try:
            runtime: DeviceRuntime = open_runtime(vendor)
        except RuntimeUnavailable as error:
            errors.append(str(error))
            continue
        number = device.index or 0
        logger.info("KV lies on %s: %s, device %d", device, runtime.api, number)
        return DeviceMemory(runtime, number)
    raise RuntimeUnavailable(f"KV lies on {device}, and no vendor's library works: {'; '.join(errors)}")


def wait_for_compute(device: Any) -> None:
    """Block until what this thread launched on the device has ended."""
    import torch

    torch.accelerator.current_stream(device).synchronize()


def _is_hip() -> bool:
    import torch

    return getattr(torch.version, "hip", None) is not None
