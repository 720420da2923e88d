# SPDX-License-Identifier: Apache-2.0
"""How XPU C++ kernels are launched: clusters of cores that share the tiles of all planes and layers."""

from __future__ import annotations

from collections.abc import Sequence

from sage_kv_connector.kernels.common.group import GroupLaunches, check_rows
from sage_kv_connector.kernels.common.launch import PlaneLayout
from sage_kv_connector.kernels.plane import KernelLaunch

#: Of every XPU from the second generation on, as public launchers have them; a core takes tile after tile.
MOST_CLUSTERS = 8
CORES = 64


class GroupKernels(GroupLaunches):
    """XPU C++ kernels over one group of pages: they move pieces of rows, channel beside channel."""

    def check(self, dtype: str, layout: PlaneLayout) -> None:
        check_rows(layout)

    def launch(
        self, function: int, planes: Sequence[PlaneLayout], tiles: Sequence[int], layers: int, argument: bytes
    ) -> KernelLaunch:
        clusters = min(-(-sum(tiles) * layers // CORES), MOST_CLUSTERS)
        return KernelLaunch(function, (clusters, 1), CORES, 0, argument)
