# SPDX-License-Identifier: Apache-2.0
"""What this vendor's probe makes of machines and of its tools' outputs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.hardware.report.descriptors import find_descriptor
from sage_kv_connector.vendors.hygon import probe as hygon
from tests.hardware.recorded import link, nodes, notes, profile_of, speed
from tests.vendors.hygon.samples import SAMPLES


def test_hygon() -> None:
    profile = profile_of("hygon")
    assert len(profile.devices) == 4  # the CPU's root complexes have the same vendor id
    assert nodes(profile) == [0, 0, 2, 2]  # sysfs says 0 for all
    assert "likely wrong" in notes(profile) and "NUMA node 2 by hy-smi --showtoponuma" in notes(profile)
    any_pair = link(profile, "hygon0", "hygon3")
    assert (any_pair.kind, any_pair.hops and any_pair.hops.value, speed(any_pair)) == ("hsw", 1, 166e9)
    older = profile_of("hygon_z100")
    assert link(older, "hygon0", "hygon1").kind == "xgmi"
    assert nodes(older) == [0, 1, 2, 3]
    assert "(1d94:54b7) is in no table" in notes(older)


@given(columns=st.lists(st.sampled_from(["Fan", "SCLK", "Dec%", "Enc%", "New"]), max_size=4))
def test_hygon_columns_come_and_go(columns: list[str]) -> None:
    header = ["HCU", "Temp", *columns]
    rows = [[str(card), *["0"] * (len(header) - 1)] for card in range(3)]
    text = "\n".join("   ".join(row) for row in [["====="], header, *rows, ["====="]])
    assert hygon.parse_table("hy-smi", text) == [0, 1, 2]


def test_hygon_words_differ_by_version() -> None:
    newer, older = SAMPLES["hy-smi topology"], SAMPLES["rocm-smi topology"]
    kinds, nodes = newer[0](newer[1])
    assert "Numa Node 0" in newer[1] and nodes == {0: 0, 1: 0, 2: 2, 3: 2}  # no colon
    assert kinds["link type"].cells["HCU0", "HCU3"] == "HSW"
    kinds, nodes = older[0](older[1])
    assert "Numa Node: 0" in older[1] and nodes == {0: 0, 1: 1, 2: 2, 3: 3}
    assert kinds["hops"].cells["GPU0", "GPU3"] == "1"


def test_json_may_stand_behind_warnings() -> None:
    assert SAMPLES["hy-smi memory"][1].startswith("WARNING")
    assert hygon.parse_cards("t", SAMPLES["hy-smi memory"][1], ("vram total memory (b)",))[3] == "68702699520"


def test_names_that_begin_alike_are_told_apart() -> None:
    k100 = find_descriptor("hygon", None, "K100_AI")
    assert k100 is not None and k100.chip == "DCU K100_AI"
