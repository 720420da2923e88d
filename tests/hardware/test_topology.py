# SPDX-License-Identifier: Apache-2.0
"""What ``probe`` makes of a machine of each vendor, whole and with one thing broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sage_kv_connector.hardware.probing.accelerator_descriptor import LinkKind
from sage_kv_connector.hardware.probing.profile import HardwareProfile, Link, published_schema
from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.probing.tool_output import ToolFormatError
from sage_kv_connector.hardware.report.recommend import recommend
from sage_kv_connector.hardware.report.topology import probe
from sage_kv_connector.vendors.ascend import probe as ascend
from sage_kv_connector.vendors.cambricon import probe as cambricon
from sage_kv_connector.vendors.kunlunxin import probe as kunlunxin
from sage_kv_connector.vendors.nvidia import probe as nvidia
from tests.hardware.recorded import NAMES, RECORDINGS, copied, file_of_call, profile_of


def link(profile: HardwareProfile, a: str, b: str) -> Link:
    return next(one for one in profile.links if {one.a, one.b} == {a, b})


def nodes(profile: HardwareProfile) -> list[int | None]:
    return [device.numa_node.value if device.numa_node else None for device in profile.devices]


def speed(one: Link) -> float | None:
    return one.bytes_per_s.value if one.bytes_per_s else None


def notes(profile: HardwareProfile) -> str:
    return "\n".join(f"{note.about}: {note.text}" for note in profile.notes)


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_fits_the_published_schema(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    profile = profile_of(name).model_copy(deep=True)
    profile.recommendation = recommend(profile)
    document = json.loads(profile.model_dump_json())
    jsonschema.Draft202012Validator(published_schema()).validate(document)
    assert HardwareProfile.model_validate(document) == profile
    del document["platform"]["kernel"]
    with pytest.raises(jsonschema.ValidationError, match="kernel"):
        jsonschema.Draft202012Validator(published_schema()).validate(document)


def test_ascend_a2() -> None:
    profile = profile_of("ascend_a2")
    assert [device.chip for device in profile.devices] == ["Ascend 910B"] * 8
    # sysfs says -1; the nodes come from the table's CPU affinity.
    assert nodes(profile) == [6, 6, 4, 4, 0, 0, 2, 2]
    meshed = [one for one in profile.links if one.kind is LinkKind.hccs]
    assert len(meshed) == 28 and {speed(one) for one in meshed} == {28e9}
    ports = [one for one in profile.links if one.kind is LinkKind.roce]
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
    assert link(profile, "ascend2", "ascend3").kind is LinkKind.sio
    across = link(profile, "ascend3", "ascend12")
    assert (across.kind, across.path, across.hops and across.hops.value) == (LinkKind.hccs, "HCCS_SW", 2)
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
    assert link(newer, "ascend0", "ascend1").kind is LinkKind.ub
    assert all("NIC0" not in (one.a, one.b) for one in newer.links)  # NA: nothing is known
    pcie = profile_of("ascend_pcie")
    assert [link(pcie, "ascend0", f"ascend{other}").path for other in (1, 2, 3)] == ["PXB", "SYS", "SYS"]
    assert {one.kind for one in pcie.links} == {LinkKind.pcie, LinkKind.tcp}
    assert "exit status 1: Cmd os system is not supported" in notes(pcie)


def test_cambricon() -> None:
    profile = profile_of("cambricon")
    assert [device.name for device in profile.devices] == ["MLU370-X8"] * 4
    assert nodes(profile) == [0, 0, 1, 1]
    assert link(profile, "cambricon0", "cambricon3").kind is LinkKind.mlu_link
    port = next(one for one in profile.rdma)
    assert (port.layer, port.max_packet_bytes and port.max_packet_bytes.value) == ("roce", 4096 // 4)
    assert link(profile_of("cambricon_sriov"), "cambricon0", "cambricon1").path == "CPU"
    older = profile_of("cambricon_v4")
    assert [device.pci_address for device in older.devices] == ["0000:39:00.0", "0000:3d:00.0"]
    assert "cards are taken in the order of PCI addresses" in notes(older)


def test_hygon() -> None:
    profile = profile_of("hygon")
    assert len(profile.devices) == 4  # the CPU's root complexes have the same vendor id
    assert nodes(profile) == [0, 0, 2, 2]  # sysfs says 0 for all
    assert "likely wrong" in notes(profile) and "NUMA node 2 by hy-smi --showtoponuma" in notes(profile)
    any_pair = link(profile, "hygon0", "hygon3")
    assert (any_pair.kind, any_pair.hops and any_pair.hops.value, speed(any_pair)) == (LinkKind.hsw, 1, 166e9)
    older = profile_of("hygon_z100")
    assert link(older, "hygon0", "hygon1").kind is LinkKind.xgmi
    assert nodes(older) == [0, 1, 2, 3]
    assert "(1d94:54b7) is in no table" in notes(older)


def test_kunlunxin() -> None:
    profile = profile_of("kunlunxin")
    kinds = {(a, b): link(profile, f"kunlunxin{a}", f"kunlunxin{b}").kind for a in range(8) for b in range(a)}
    assert all((kind is LinkKind.xpu_link) == (a // 4 == b // 4) for (a, b), kind in kinds.items())
    assert nodes(profile) == [0] * 4 + [1] * 4
    assert link(profile, "kunlunxin6", "mlx5_bond_6").path == "PIX"
    assert link(profile, "kunlunxin6", "mlx5_bond_7").path == "PHB"
    assert len(profile.rdma) == 8 and all(port.active for port in profile.rdma)


def test_nvidia() -> None:
    profile = profile_of("nvidia")
    six = link(profile, "nvidia0", "nvidia3")
    assert (six.kind, six.path, speed(six)) == (LinkKind.nvlink, "NV6", 150e9)
    assert six.bytes_per_s and "6 × 2.5e+10 B/s (H100 data sheet" in six.bytes_per_s.source
    # A card at rest shows 2.5 GT/s; what it can do is taken, and no note made of it.
    assert speed(link(profile, "nvidia0", "host")) == 63e9 and "GT/s" not in notes(profile)
    assert [port.active for port in profile.rdma] == [False, True, True, True]
    flat = profile_of("nvidia_pcie")
    assert link(flat, "nvidia0", "nvidia1").path == "NODE" and nodes(flat) == [0, 0]


def test_soft_roce_is_shown_as_what_it_is() -> None:
    (port,) = profile_of("soft_roce").rdma
    # The driver's rate is a constant; perftest said "Mtu: 1024" on this guest.
    assert port.software and port.active and port.bytes_per_s is None and port.interface == "eth0"
    assert port.max_packet_bytes is not None and port.max_packet_bytes.value == 1024


def test_a_device_of_an_unknown_class_is_found_by_its_tool(tmp_path: Path) -> None:
    recording = copied("cambricon", tmp_path)
    path = recording / "machine.yaml"
    path.write_text(path.read_text().replace("'0x120000'", "'0x048000'").replace("0x120000", "0x048000"))
    profile = probe(RecordedMachine(recording))
    assert [device.pci_device for device in profile.devices] == ["cabc:0371"] * 4


def test_wsl2() -> None:
    profile = profile_of("wsl2")
    assert profile.platform.wsl2 and len(profile.devices) == 1
    assert "not in sysfs here" in notes(profile)


def test_a_hanging_tool_is_a_note() -> None:
    profile = profile_of("ascend_tools_gone")
    assert [device.chip for device in profile.devices] == ["Ascend 910B"] * 2  # from PCI alone
    assert "npu-smi info: gave no answer within the time limit" in notes(profile)


BROKEN = [
    ("ascend_a2", ascend.INFO, "0000:C2:00.0", "lost        ", "`npu-smi info` line 11: .* NPU and name"),
    ("ascend_a2", ascend.MAPPING, "Chip ID", "Chip", "line 1: .* a header from 'NPU ID'"),
    ("ascend_a2", ascend.TOPOLOGY, "NPU4       HCCS ", "NPU4       !!!! ", "column NPU0, not '!!!!'"),
    ("ascend_a2", ("hccn_tool", "-i", "2", "-speed", "-g"), "Mb/s", "furlongs", "a speed in Mb/s"),
    ("cambricon", cambricon.TABLE, "0000:16:00.0", "unknown     ", "line 11: .* a PCI address under Bus-Id"),
    ("cambricon", cambricon.TOPOLOGY, "MLU3    MLK", "MLU3", "line 5: .* a link's word in column MLU3"),
    ("hygon", ("hy-smi",), "81.0W    auto", "81.0W", "expected 10 columns"),
    ("hygon", ("hy-smi", "--showtopo"), "Link Type", "Kind", "a section 'Link Type between two"),
    ("hygon", ("hy-smi", "--showbus", "--json"), "}}", "", "expected JSON"),
    ("kunlunxin", kunlunxin.TABLE, "98304MiB", "most", "MiB / …MiB"),
    ("kunlunxin", kunlunxin.TOPOLOGY, "XPU7\tSYS", "XPU9\tSYS", "a row of XPU0"),
    ("nvidia", nvidia.QUERY, "81559", "lots", "memory in MiB"),
    ("nvidia", nvidia.TOPOLOGY, "GPU3\tNV6\tNV6", "GPU3\tNV6\tn6", "column GPU1, not 'n6'"),
]


@pytest.mark.parametrize(("name", "call", "old", "new", "says"), BROKEN)
def test_a_broken_recording_is_named_by_its_line(
    name: str, call: tuple[str, ...], old: str, new: str, says: str, tmp_path: Path
) -> None:
    recording = copied(name, tmp_path)
    path = file_of_call(recording, *call)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ToolFormatError, match=says) as caught:
        probe(RecordedMachine(recording))
    assert caught.value.command == " ".join(call)


def test_a_missing_tool_changes_nothing_else() -> None:
    from sage_kv_connector.hardware.probing.machine import WithoutTools

    profile = probe(WithoutTools(RecordedMachine(RECORDINGS / "ascend_a2"), ["npu-smi"]))
    assert len(profile.devices) == 8 and "npu-smi: not found here" in notes(profile)


def test_unknown_words_of_links_are_kept_and_said(tmp_path: Path) -> None:
    recording = copied("nvidia", tmp_path)
    path = file_of_call(recording, *nvidia.TOPOLOGY)
    path.write_text(path.read_text().replace("NV6", "C2C"))
    profile = probe(RecordedMachine(recording))
    assert link(profile, "nvidia0", "nvidia1").kind is LinkKind.unknown
    assert "C2C, a word we don't know" in notes(profile)
