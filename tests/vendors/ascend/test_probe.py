# SPDX-License-Identifier: Apache-2.0
"""What this vendor's probe makes of machines and of its tools' outputs."""

from __future__ import annotations

from pathlib import Path

from sage_kv_connector.hardware.probing.machine import WithoutTools
from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.report.descriptors import find_descriptor
from sage_kv_connector.hardware.report.topology import probe
from sage_kv_connector.vendors.ascend import probe as ascend
from tests.hardware.recorded import RECORDINGS, copied, file_of_call, link, nodes, notes, profile_of, speed
from tests.vendors.ascend.samples import SAMPLES


def test_ascend_a2() -> None:
    profile = profile_of("ascend_a2")
    assert [device.chip for device in profile.devices] == ["Ascend 910B"] * 8
    # sysfs says -1; the nodes come from the table's CPU affinity.
    assert nodes(profile) == [6, 6, 4, 4, 0, 0, 2, 2]
    meshed = [one for one in profile.links if one.kind == "hccs"]
    assert len(meshed) == 28 and {speed(one) for one in meshed} == {28e9}
    ports = [one for one in profile.links if one.kind == "roce"]
    assert [one.up for one in ports] == [True] * 6 + [False, True]
    assert speed(ports[0]) == 25e9 and ports[0].path == "10.20.0.11"
    assert all(device.pci_device == "19e5:d802" for device in profile.devices)  # the vendor's NIC is none


def test_a_wrong_speed_in_sysfs_is_said_and_not_used() -> None:
    profile = profile_of("ascend_a2")
    assert profile.devices[0].pci and profile.devices[0].pci.speed_gt_s == 2.5
    assert speed(link(profile, "ascend0", "host")) == 63e9
    assert "sysfs says PCIe 2.5 GT/s x1 (0.2 GB/s), the table 63.0 GB/s" in notes(profile)
    assert "sysfs numa_node is -1 for every device" in notes(profile)


def test_ascend_a3_dies_are_devices() -> None:
    profile = profile_of("ascend_a3")
    assert [device.id for device in profile.devices] == ["ascend2", "ascend3", "ascend12", "ascend13"]
    assert {device.chip for device in profile.devices} == {"Ascend 910C"}  # by PCI id: the name says less
    assert link(profile, "ascend2", "ascend3").kind == "sio"
    across = link(profile, "ascend3", "ascend12")
    assert (across.kind, across.path, across.hops and across.hops.value) == ("hccs", "HCCS_SW", 2)
    assert "hccn_tool: not found here" in notes(profile)


def test_ascend_in_a_container_has_other_numbers(tmp_path: Path) -> None:
    """NPU 5 alone: the runtime counts it 0, tables and hccn_tool 5."""
    recording = copied("ascend_a2", tmp_path)
    info = file_of_call(recording, *ascend.INFO)
    lines = info.read_text().splitlines(keepends=True)
    start = next(at for at, line in enumerate(lines) if line.startswith("| 5     910B3"))
    info.write_text("".join([*lines[:7], *lines[start : start + 3]]))
    mapping = "\tNPU ID    Chip ID    Chip Logic ID    Chip Name\n\t5    0    0    Ascend 910B3\n\t5    1    -    Mcu\n"
    file_of_call(recording, *ascend.MAPPING).write_text(mapping)
    file_of_call(recording, *ascend.TOPOLOGY).write_text("\tNPU5\tCPU Affinity\nNPU5\tX\t0-23\n")
    profile = probe(RecordedMachine(recording))
    assert [(device.id, device.pci_address) for device in profile.devices] == [("ascend0", "0000:02:00.0")]
    assert nodes(profile) == [0] and profile.devices[0].node == "/dev/davinci5"
    assert link(profile, "ascend0", "network").path == "10.20.5.11"


def test_ascend_a5_and_pcie() -> None:
    newer = profile_of("ascend_a5")
    assert link(newer, "ascend0", "ascend1").kind == "ub"
    assert all("NIC0" not in (one.a, one.b) for one in newer.links)  # NA: nothing is known
    pcie = profile_of("ascend_pcie")
    assert [link(pcie, "ascend0", f"ascend{other}").path for other in (1, 2, 3)] == ["PXB", "SYS", "SYS"]
    assert {one.kind for one in pcie.links} == {"pcie", "tcp"}
    assert "exit status 1: Cmd os system is not supported" in notes(pcie)


def test_a_hanging_tool_is_a_note() -> None:
    profile = profile_of("ascend_tools_gone")
    assert [device.chip for device in profile.devices] == ["Ascend 910B"] * 2  # from PCI alone
    assert "npu-smi info: gave no answer within the time limit" in notes(profile)


def test_a_missing_tool_changes_nothing_else() -> None:
    profile = probe(WithoutTools(RecordedMachine(RECORDINGS / "ascend_a2"), ["npu-smi"]))
    assert len(profile.devices) == 8 and "npu-smi: not found here" in notes(profile)


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


def test_hccn_tool_and_its_configuration() -> None:
    assert ascend.parse_speed("t", "Speed: 200000 Mb/s\n") == 25e9
    assert ascend.parse_speed("t", "Speed: 100000Mb/s\n") == 12.5e9
    assert ascend.parse_link("t", "link status: DOWN\n") is False
    assert ascend.parse_ip("t", "ipaddr:10.0.0.1\nnetmask:255.255.0.0\n") == "10.0.0.1"
    assert ascend.parse_hccn_conf("address_0=10.0.0.1\nnetmask_0=255.0.0.0\naddress_7=10.0.0.8\n") == {
        0: "10.0.0.1",
        7: "10.0.0.8",
    }


def test_the_pci_id_decides_before_the_name() -> None:
    found = find_descriptor("ascend", "d803", "Ascend910")
    assert found is not None and found.chip == "Ascend 910C"
    by_name = find_descriptor("ascend", None, "910B3")
    assert by_name is not None and by_name.chip == "Ascend 910B"
