# SPDX-License-Identifier: Apache-2.0
"""Every parser on every format that is known, and on what drivers may make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.hardware.probing.tool_output import (
    ToolFormatError,
    parse_json,
    parse_matrix,
    pci_address,
)
from sage_kv_connector.hardware.report.measure_rdma import parse_perftest
from sage_kv_connector.vendors.ascend import probe as ascend
from sage_kv_connector.vendors.cambricon import probe as cambricon
from sage_kv_connector.vendors.hygon import probe as hygon
from sage_kv_connector.vendors.kunlunxin import probe as kunlunxin
from sage_kv_connector.vendors.nvidia import probe as nvidia
from tests.hardware.recorded import output_of

SAMPLES: dict[str, tuple[Callable[[str], Any], str]] = {
    "npu-smi A2": (ascend.parse_info, output_of("ascend_a2", *ascend.INFO)),
    "npu-smi A3": (ascend.parse_info, output_of("ascend_a3", *ascend.INFO)),
    "npu-smi 310P": (ascend.parse_info, output_of("ascend_pcie", *ascend.INFO)),
    "mapping A2": (ascend.parse_mapping, output_of("ascend_a2", *ascend.MAPPING)),
    "mapping A3": (ascend.parse_mapping, output_of("ascend_a3", *ascend.MAPPING)),
    "mapping A5": (ascend.parse_mapping, output_of("ascend_a5", *ascend.MAPPING)),
    "topology A2": (
        lambda text: parse_matrix("npu-smi info -t topo", text, "NPU|Phy-ID"),
        output_of("ascend_a2", *ascend.TOPOLOGY),
    ),
    "topology A3": (
        lambda text: parse_matrix("npu-smi info -t topo", text, "NPU|Phy-ID"),
        output_of("ascend_a3", *ascend.TOPOLOGY),
    ),
    "topology A5": (
        lambda text: parse_matrix("npu-smi info -t topo", text, "NPU|Phy-ID"),
        output_of("ascend_a5", *ascend.TOPOLOGY),
    ),
    "topology PCIe": (
        lambda text: parse_matrix("npu-smi info -t topo", text, "NPU|Phy-ID"),
        output_of("ascend_pcie", *ascend.TOPOLOGY),
    ),
    "cnmon 5.10.22": (cambricon.parse_table, output_of("cambricon", *cambricon.TABLE)),
    "cnmon 5.10.13": (cambricon.parse_table, output_of("cambricon_sriov", *cambricon.TABLE)),
    "cnmon 4.20.11": (cambricon.parse_table, output_of("cambricon_v4", *cambricon.TABLE)),
    "cnmon topo": (
        lambda text: parse_matrix("cnmon topo -m", text, "MLU"),
        output_of("cambricon", *cambricon.TOPOLOGY),
    ),
    "hy-smi BW1000": (lambda text: hygon.parse_table("hy-smi", text), output_of("hygon", "hy-smi")),
    "rocm-smi Z100": (lambda text: hygon.parse_table("rocm-smi", text), output_of("hygon_z100", "rocm-smi")),
    "hy-smi topology": (
        lambda text: hygon.parse_topology("hy-smi --showtopo", text),
        output_of("hygon", "hy-smi", "--showtopo"),
    ),
    "rocm-smi topology": (
        lambda text: hygon.parse_topology("rocm-smi --showtopo", text),
        output_of("hygon_z100", "rocm-smi", "--showtopo"),
    ),
    "hy-smi memory": (
        lambda text: hygon.parse_cards("hy-smi", text, ("VRAM Total Memory (B)",)),
        output_of("hygon", "hy-smi", "--showmeminfo", "vram", "--json"),
    ),
    "xpu-smi": (kunlunxin.parse_table, output_of("kunlunxin", *kunlunxin.TABLE)),
    "xpu-smi topo": (
        lambda text: parse_matrix("xpu-smi topo -m", text, "XPU"),
        output_of("kunlunxin", *kunlunxin.TOPOLOGY),
    ),
    "nvidia-smi query": (nvidia.parse_query, output_of("nvidia", *nvidia.QUERY)),
    "nvidia-smi topo": (
        lambda text: parse_matrix("nvidia-smi topo -m", text, "GPU"),
        output_of("nvidia", *nvidia.TOPOLOGY),
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_is_there_and_read(name: str) -> None:
    parse, text = SAMPLES[name]
    assert text
    assert parse(text)


@given(name=st.sampled_from(sorted(SAMPLES)), cut=st.floats(0, 1))
def test_cut_output_is_read_or_named(name: str, cut: float) -> None:
    parse, text = SAMPLES[name]
    try:
        parse(text[: int(len(text) * cut)])
    except ToolFormatError as error:
        assert "expected" in str(error)


@given(name=st.sampled_from(sorted(SAMPLES)), data=st.data())
def test_spoilt_output_is_read_or_named(name: str, data: st.DataObject) -> None:
    parse, text = SAMPLES[name]
    lines = text.splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    lines[at] = data.draw(
        st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=120)
    )
    try:
        parse("\n".join(lines))
    except ToolFormatError as error:
        assert error.expected


@given(st.text(max_size=400))
def test_any_text_is_read_or_named(text: str) -> None:
    for parse, _ in SAMPLES.values():
        try:
            parse(text)
        except ToolFormatError:
            pass


@pytest.mark.parametrize("name", ["npu-smi A2", "npu-smi 310P", "cnmon 5.10.22", "xpu-smi"])
def test_a_table_that_ends_too_early_is_no_smaller_machine(name: str) -> None:
    parse, text = SAMPLES[name]
    lines = text.splitlines()
    third = [
        at
        for at, line in enumerate(lines)
        if "/ 65536" in line or "44280" in line or "23374" in line or "98304" in line
    ]
    with pytest.raises(ToolFormatError, match="closing line"):
        parse("\n".join(lines[: third[2] + 1]))


def test_ascend_cards_and_dies() -> None:
    chips = ascend.parse_info(SAMPLES["npu-smi A2"][1])
    assert [chip.npu for chip in chips] == list(range(8))
    assert (chips[0].name, chips[0].address, chips[0].memory_mb) == ("910B3", "0000:c1:00.0", 65536)
    dies = ascend.parse_info(SAMPLES["npu-smi A3"][1])
    assert [(die.npu, die.chip, die.physical) for die in dies] == [
        (1, 0, 2),
        (1, 1, 3),
        (6, 0, 12),
        (6, 1, 13),
    ]
    inference = ascend.parse_info(SAMPLES["npu-smi 310P"][1])
    assert [chip.memory_mb for chip in inference] == [44280] * 4  # DDR; there is no HBM column


def test_one_card_row_may_stand_above_two_chips() -> None:
    text = """\
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 4     Ascend910           | OK            | 171.9       38                0    / 0             |
| 0     8                   | 0000:8D:00.0  | 0           0    / 0          3127 / 65536         |
| 1     9                   | 0000:8F:00.0  | 0           0    / 0          2881 / 65536         |
+===========================+===============+====================================================+
"""
    assert [(chip.npu, chip.physical) for chip in ascend.parse_info(text)] == [(4, 8), (4, 9)]


def test_mapping_takes_the_runtime_s_id() -> None:
    a2 = ascend.parse_mapping(SAMPLES["mapping A2"][1])
    assert [chip.logic for chip in a2] == list(range(8))  # Mcu rows are left out
    a5 = ascend.parse_mapping(SAMPLES["mapping A5"][1])
    assert [(chip.logic, chip.physical) for chip in a5] == [(None, 0), (None, 1)]


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (ascend.parse_info, "npu-smi: command failed\n", "no line of its output"),
        (ascend.parse_info, "| 0     910B3     | OK | 96 |\n", "line 1"),
        (ascend.parse_mapping, "NPU  Chip  Name\n0 0 x\n", "line 1: 'NPU  Chip  Name'"),
        (
            ascend.parse_mapping,
            "\tNPU ID    Chip ID    Chip Logic ID    Chip Name\n\tx    0    0    Ascend 910B3\n",
            r"line 2: '\\tx .*NPU ID as a whole number, not 'x'",
        ),
        (cambricon.parse_table, "| 0  /  MLU370 v1 | 0000:13:00.0 | 0% |\n", "line 1.*headers"),
        (kunlunxin.parse_table, "|=====+=====+=====|\n| 0 P800 N/A | no bus id | 0 |\n", "line 2.*Bus-Id"),
        (nvidia.parse_query, "0, 00000000:1B:00.0, many, H100\n", "line 1.*memory in MiB .* not 'many'"),
        (nvidia.parse_query, "0, somewhere, 81559, H100\n", "a PCI address, not 'somewhere'"),
        (
            lambda text: hygon.parse_table("hy-smi", text),
            "HCU  Temp  Mode\n0  50C\n",
            r"`hy-smi` line 2: '0  50C': expected 3 columns: HCU Temp Mode",
        ),
        (
            lambda text: parse_matrix("t", text, "GPU"),
            "     GPU0  GPU1\nGPU0  X  NV4\nGPU1  NV4\n",
            "line 3: 'GPU1  NV4': expected 2 cells after GPU1",
        ),
        (
            lambda text: parse_matrix("t", text, "GPU"),
            "     GPU0  GPU1\nGPU0  X  NV4\n",
            "line 2: .* expected a row of GPU1 after it",
        ),
        (
            lambda text: parse_matrix("t", text, "GPU"),
            "     GPU0  GPU1\nGPU0  X  ???\nGPU1  NV4  X\n",
            "line 2.*column GPU1, not '\\?\\?\\?'",
        ),
        (lambda text: parse_json("t", text), "{'card0': 1}\n", "line 1.*JSON"),
        (lambda text: parse_json("t", text), "no devices\n", "line 1: 'no devices': expected a JSON object"),
        (
            lambda text: hygon.parse_cards("t", text, ("PCI Bus",)),
            '{"card0": {"Bus": "1"}}',
            "PCI Bus of card0",
        ),
        (lambda text: ascend.parse_link("t", text), "link status: MAYBE\n", "UP or DOWN"),
        (lambda text: ascend.parse_speed("t", text), "Speed: fast\n", "in Mb/s"),
        (lambda text: ascend.parse_ip("t", text), "no address\n", "a line 'ipaddr: …'"),
        (
            lambda text: hygon.parse_topology("t", text),
            "= Link Type between two HCUs =\n  HCU0  HCU1\nHCU0  0  HSW\nHCU1  HSW  0\n== Numa Nodes ==\nHCU[0] x\n",
            "line 6: 'HCU\\[0\\] x'",
        ),
    ],
)
def test_what_can_t_be_read_is_named(parse: Callable[[str], Any], text: str, says: str) -> None:
    with pytest.raises(ToolFormatError, match=says):
        parse(text)


@given(columns=st.lists(st.sampled_from(["Fan", "SCLK", "Dec%", "Enc%", "New"]), max_size=4))
def test_hygon_columns_come_and_go(columns: list[str]) -> None:
    header = ["HCU", "Temp", *columns]
    rows = [[str(card), *["0"] * (len(header) - 1)] for card in range(3)]
    text = "\n".join("   ".join(row) for row in [["====="], header, *rows, ["====="]])
    assert hygon.parse_table("hy-smi", text) == [0, 1, 2]


@given(extra=st.lists(st.sampled_from(["PCIe Affinity", "Health State", "Fabric NUMA"]), unique=True))
def test_columns_beside_a_matrix_come_and_go(extra: list[str]) -> None:
    header = "\t".join(["", "GPU0", "GPU1", "CPU Affinity", "NUMA Affinity", *extra])
    rows = [
        "\t".join(["GPU0", " X ", "NV4", "0-7", "0", *extra]),
        "\t".join(["GPU1", "NV4", " X ", "8-15", "1", *extra]),
    ]
    matrix = parse_matrix("t", "\n".join([header, *rows]), "GPU")
    assert matrix.cells["GPU0", "GPU1"] == "NV4"
    assert matrix.extras["GPU1"]["NUMA Affinity"] == "1"


def test_blank_cells_beside_a_matrix_are_not_shifted() -> None:
    header = "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    assert parse_matrix("t", header + "GPU0\t X \t\t1\tN/A\n", "GPU").extras["GPU0"] == {}
    kept = parse_matrix("t", header + "GPU0\t X \t0-7,9\t\tN/A\n", "GPU").extras["GPU0"]
    assert kept == {"CPU Affinity": "0-7,9"}
    doubled = parse_matrix("t", header + "GPU0\t X \t0-7\t1\t\tN/A\n", "GPU").extras["GPU0"]
    assert doubled["NUMA Affinity"] == "1"  # newer drivers put two tabs there


def test_a_matrix_of_one_device_has_a_header() -> None:
    matrix = parse_matrix("t", "\tNPU0\tCPU Affinity\nNPU0\tX\t0-23\n", "NPU")
    assert matrix.extras == {"NPU0": {"CPU Affinity": "0-23"}}
    assert (
        parse_matrix("t", "\tGPU0\tNIC0\tCPU Affinity\nGPU0\tX\tPIX\t0-7\n", "GPU").cells["GPU0", "NIC0"]
        == "PIX"
    )


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


def test_cnmon_columns_follow_the_header() -> None:
    new, old = (cambricon.parse_table(SAMPLES[f"cnmon {one}"][1]) for one in ("5.10.22", "4.20.11"))
    assert (new[3].name, new[3].address, new[3].memory_mib) == ("MLU370-X8", "0000:8c:00.0", 23374)
    # 4.20 prints driver and virtual memory where 5.10 prints bus id and mode.
    assert (old[1].name, old[1].address, old[1].memory_mib) == ("MLU370-X4", None, 23308)


def test_nic_columns_are_named_by_the_legend_or_by_themselves() -> None:
    parse, text = SAMPLES["xpu-smi topo"]
    assert parse(text).legend["NIC3"] == "mlx5_bond_3"
    direct = "\tXPU0\tXPU1\tmlx5_0\tCPU Affinity\nXPU0\t X \tXL\tPIX\t0-7\nXPU1\tXL\t X \tNODE\t0-7\n"
    matrix = parse_matrix("t", direct, "XPU")
    assert matrix.labels == ["XPU0", "XPU1", "mlx5_0"] and matrix.cells["XPU1", "mlx5_0"] == "NODE"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("00000000:1B:00.0", "0000:1b:00.0"),
        ("0000:C1:00.0", "0000:c1:00.0"),
        ("3b:00.1", "0000:3b:00.1"),
        ("00010000:01:00.0", "10000:01:00.0"),
        ("NA", None),
        ("0000:C1:00", None),
    ],
)
def test_pci_addresses(text: str, address: str | None) -> None:
    assert pci_address(text) == address


def test_hccn_tool_and_its_configuration() -> None:
    assert ascend.parse_speed("t", "Speed: 200000 Mb/s\n") == 25e9
    assert ascend.parse_speed("t", "Speed: 100000Mb/s\n") == 12.5e9
    assert ascend.parse_link("t", "link status: DOWN\n") is False
    assert ascend.parse_ip("t", "ipaddr:10.0.0.1\nnetmask:255.255.0.0\n") == "10.0.0.1"
    assert ascend.parse_hccn_conf("address_0=10.0.0.1\nnetmask_0=255.0.0.0\naddress_7=10.0.0.8\n") == {
        0: "10.0.0.1",
        7: "10.0.0.8",
    }


PERFTEST_BW = """\
---------------------------------------------------------------------------------------
                    RDMA_Write BW Test
 Dual-port       : OFF          Device         : rxe0
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 1048576    1000             11.83              11.52                0.001373
---------------------------------------------------------------------------------------
"""
PERFTEST_LAT = """\
#bytes #iterations  t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]  99% percentile[usec]
 8       1000          2.11           9.04         2.26               2.31           0.19            3.02
"""


def test_perftest_columns_are_found_by_name() -> None:
    assert parse_perftest("t", PERFTEST_BW, "BW average[Gb/sec]") == 11.52
    assert parse_perftest("t", PERFTEST_LAT, "t_typical[usec]") == 2.26
    assert parse_perftest("t", PERFTEST_LAT, "99% percentile[usec]") == 3.02
    with pytest.raises(ToolFormatError, match="a column"):
        parse_perftest("t", PERFTEST_LAT, "BW average[Gb/sec]")
    with pytest.raises(ToolFormatError, match="#bytes"):
        parse_perftest("t", "Couldn't connect\n", "t_typical[usec]")
