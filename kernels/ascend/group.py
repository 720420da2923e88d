# SPDX-License-Identifier: Apache-2.0
"""How Ascend C kernels are launched: vector cores that share the tiles of all planes and layers."""

from __future__ import annotations

from collections.abc import Sequence

from sage_kv_connector.kernels.common.group import GroupLaunches, check_rows
from sage_kv_connector.kernels.common.launch import PlaneLayout
from sage_kv_connector.kernels.plane import KernelLaunch

#: Vector cores of a die of Atlas A2 and A3: two for each of up to 24 cube cores. A core takes tile after tile.
MOST_CORES = 48
#: Room in unified buffer: kLanes of lanes.h.
MAX_DIM = 2048


class GroupKernels(GroupLaunches):
    """Ascend C kernels over one group of pages: they move whole rows, channel beside channel."""

    def check(self, dtype: str, layout: PlaneLayout) -> None:
        check_rows(layout, MAX_DIM)

    def launch(
        self, function: int, planes: Sequence[PlaneLayout], tiles: Sequence[int], layers: int, argument: bytes
    ) -> KernelLaunch:
        return KernelLaunch(function, (min(sum(tiles) * layers, MOST_CORES), 1), 1, 0, argument)
