# SPDX-License-Identifier: Apache-2.0
"""What this vendor's probe makes of machines and of its tools' outputs."""

from __future__ import annotations

from sage_kv_connector.hardware.probing.tool_output import parse_matrix
from tests.hardware.recorded import link, nodes, profile_of
from tests.vendors.kunlunxin.samples import SAMPLES


def test_kunlunxin() -> None:
    profile = profile_of("kunlunxin")
    kinds = {(a, b): link(profile, f"kunlunxin{a}", f"kunlunxin{b}").kind for a in range(8) for b in range(a)}
    assert all((kind == "xpu-link") == (a // 4 == b // 4) for (a, b), kind in kinds.items())
    assert nodes(profile) == [0] * 4 + [1] * 4
    assert link(profile, "kunlunxin6", "mlx5_bond_6").path == "PIX"
    assert link(profile, "kunlunxin6", "mlx5_bond_7").path == "PHB"
    assert len(profile.rdma) == 8 and all(port.active for port in profile.rdma)


def test_nic_columns_are_named_by_the_legend_or_by_themselves() -> None:
    parse, text = SAMPLES["xpu-smi topo"]
    assert parse(text).legend["NIC3"] == "mlx5_bond_3"
    direct = "\tXPU0\tXPU1\tmlx5_0\tCPU Affinity\nXPU0\t X \tXL\tPIX\t0-7\nXPU1\tXL\t X \tNODE\t0-7\n"
    matrix = parse_matrix("t", direct, "XPU")
    assert matrix.labels == ["XPU0", "XPU1", "mlx5_0"] and matrix.cells["XPU1", "mlx5_0"] == "NODE"
