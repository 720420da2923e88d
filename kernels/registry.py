# SPDX-License-Identifier: Apache-2.0
"""Which kernels convert on which device.

``kernels_for("cuda")`` names the fastest set that can run here; where none can, plain
torch operations do the same, bit for bit, slower. torch is loaded when a set is made.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.plane import KVPlane, Range

log = logging.getLogger(__name__)

#: torch's device type → modules with a ``Kernels`` class, best first. "hip" is a torch
#: "cuda" device of a ROCm build. Every list ends with the fallback.
CANDIDATES = {
    "cuda": ("cuda.kernels", "triton.kernels"),
    "hip": ("hip.kernels", "triton.kernels"),
}
FALLBACK = "torch_fallback"


class KernelsUnavailable(RuntimeError):
    """A kernel set can't run here; the message says what is missing."""


class DeviceKernels(Protocol):
    """Conversion of one plane's tokens and heads between pages and wire bytes.

    Both raise ValueError for what ``KVPlane.check`` refuses. Work is queued on the
    device's current stream; nothing is synchronised.
    """

    @property
    def name(self) -> str: ...

    def encode(self, plane: KVPlane, tokens: Range, heads: Range, fmt: WireFormat) -> Any:
        """A new uint8 tensor on the plane's device: ``heads.length * fmt.span_bytes(…)`` bytes."""
        ...

    def decode(self, wire: Any, plane: KVPlane, tokens: Range, heads: Range, fmt: WireFormat) -> None:
        """Write what ``wire`` (uint8, contiguous, on the plane's device) holds into the plane's pages."""
        ...


@cache
def kernels_for(device_type: str) -> DeviceKernels:
    """Kernels for a torch device type (cpu, cuda, npu, mlu, xpu, …) or "hip"."""
    for module in CANDIDATES.get(device_type, ()):
        try:
            return _make(module, device_type)
        except (KernelsUnavailable, ImportError) as error:
            log.warning("kernels of %s can't run: %s", module.partition(".")[0], error)
    return _make(FALLBACK, device_type)


def _make(module: str, device_type: str) -> DeviceKernels:
    kernels: DeviceKernels = import_module(f"sage_kv_connector.kernels.{module}").Kernels(device_type)
    return kernels
