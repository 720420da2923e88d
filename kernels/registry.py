# SPDX-License-Identifier: Apache-2.0
"""Which kernels convert on which device.

``kernels_for("cuda")`` names the fastest set that can run here; where none can, plain
torch operations do the same, bit for bit, slower. torch is loaded when a set is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from sage_kv_connector.format.converter import Span
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.plane import KernelLaunch, KVPlane, Range
from sage_kv_connector.kernels.plane import PagedGroup as PagedGroup

log = logging.getLogger(__name__)

#: torch's device type → modules with a ``Kernels`` class, best first. "hip" is a torch
#: "cuda" device of a ROCm build. Every list ends with the fallback.
CANDIDATES = {
    "cuda": ("triton.kernels",),
    "hip": ("triton.kernels",),
}
FALLBACK = "torch_fallback"
#: A vendor's name → the module with the ``GroupKernels`` and ``compiled`` of its devices.
BY_ADDRESS = {
    "nvidia": "cuda", "hygon": "cuda", "ascend": "ascend", "cambricon": "cambricon", "kunlunxin": "kunlunxin",
}  # fmt: skip


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


class GroupKernels(Protocol):
    """Conversion of boxes of one group's pages by launches over addresses; see ``common.group``."""

    def launches(
        self, verb: str, span: Span, wire: int, length: int, bases: Sequence[Sequence[int]] | None = None
    ) -> list[KernelLaunch]: ...


class KernelSources(NamedTuple):
    """A vendor's kernels: ``compiled`` of (memory dtype, wire dtype, architecture); ``group`` takes a function's handle
    of (verb, memory dtype, wire dtype)."""

    compiled: Callable[[str, str, str], bytes]
    group: Callable[[PagedGroup, Callable[[str, str, str], int]], GroupKernels]


def kernel_sources(vendor: str) -> KernelSources:
    """Raises KernelsUnavailable for a vendor whose kernels the engine can't launch yet."""
    room = BY_ADDRESS.get(vendor)
    if room is None:
        raise KernelsUnavailable(
            f"there are no kernels to launch on devices of {vendor}; there are for {', '.join(BY_ADDRESS)}"
        )
    compiler, group = (
        import_module(f"sage_kv_connector.kernels.{room}.{name}") for name in ("compiler", "group")
    )
    return KernelSources(compiler.compiled, group.GroupKernels)


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
