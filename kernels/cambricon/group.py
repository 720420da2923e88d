# SPDX-License-Identifier: Apache-2.0
"""How BANG C kernels are launched: tasks that share the tiles of all planes and layers."""

from __future__ import annotations

from collections.abc import Sequence

from sage_kv_connector.kernels.common.group import GroupLaunches, check_rows
from sage_kv_connector.kernels.common.launch import PlaneLayout
from sage_kv_connector.kernels.plane import KernelLaunch

#: Two for each core of the largest MLUs that are described publicly; a task takes tile after tile.
MOST_TASKS = 64
#: Room in NRAM: kMaxDim of bang_kernel.mlu.
MAX_DIM = 4096


class GroupKernels(GroupLaunches):
    """BANG C kernels over one group of pages: they move whole rows, channel beside channel."""

    def check(self, dtype: str, layout: PlaneLayout) -> None:
        check_rows(layout, MAX_DIM)

    def launch(
        self, function: int, planes: Sequence[PlaneLayout], tiles: Sequence[int], layers: int, argument: bytes
    ) -> KernelLaunch:
        return KernelLaunch(function, (min(sum(tiles) * layers, MOST_TASKS), 1), 1, 0, argument)
