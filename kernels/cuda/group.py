# SPDX-License-Identifier: Apache-2.0
"""How kernels of CUDA and HIP are launched: a block for each tile of the plane with the most, in a row a plane."""

from __future__ import annotations

from collections.abc import Sequence

from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.common.group import GroupLaunches
from sage_kv_connector.kernels.common.launch import PlaneLayout
from sage_kv_connector.kernels.plane import KernelLaunch

THREADS = 256
#: Shared memory that a block has without asking for more; larger tiles of scales are refused.
SHARED_BYTES = 48 << 10


def shared_bytes(dim: int, fmt: WireFormat) -> int:
    """Shared memory of a block: 4 bytes a scale of the largest tile, 8 with zero points. Raises ValueError."""
    shared = 4 * fmt.scale_count(fmt.group_tokens, dim) * (2 if fmt.zero_point else 1)
    if shared > SHARED_BYTES:
        raise ValueError(f"scales of a tile take {shared} bytes of shared memory, at most {SHARED_BYTES}")
    return shared


class GroupKernels(GroupLaunches):
    """Kernels of CUDA and HIP over one group of pages."""

    def check(self, dtype: str, layout: PlaneLayout) -> None:
        shared_bytes(layout.dim, layout.fmt)

    def launch(
        self, function: int, planes: Sequence[PlaneLayout], tiles: Sequence[int], layers: int, argument: bytes
    ) -> KernelLaunch:
        shared = max(shared_bytes(layout.dim, layout.fmt) for layout in planes)
        return KernelLaunch(function, (max(tiles), len(planes) * layers), THREADS, shared, argument)
