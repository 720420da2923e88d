# SPDX-License-Identifier: Apache-2.0
"""What this vendor's probe makes of machines and of its tools' outputs."""

from __future__ import annotations

from pathlib import Path

from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.report.topology import probe
from sage_kv_connector.vendors.cambricon import probe as cambricon
from tests.hardware.recorded import copied, link, nodes, notes, profile_of
from tests.vendors.cambricon.samples import SAMPLES


def test_cambricon() -> None:
    profile = profile_of("cambricon")
    assert [device.name for device in profile.devices] == ["MLU370-X8"] * 4
    assert nodes(profile) == [0, 0, 1, 1]
    assert link(profile, "cambricon0", "cambricon3").kind == "mlu-link"
    port = next(one for one in profile.rdma)
    assert (port.layer, port.max_packet_bytes and port.max_packet_bytes.value) == ("roce", 4096 // 4)
    assert link(profile_of("cambricon_sriov"), "cambricon0", "cambricon1").path == "CPU"
    older = profile_of("cambricon_v4")
    assert [device.pci_address for device in older.devices] == ["0000:39:00.0", "0000:3d:00.0"]
    assert "cards are taken in the order of PCI addresses" in notes(older)


def test_a_device_of_an_unknown_class_is_found_by_its_tool(tmp_path: Path) -> None:
    recording = copied("cambricon", tmp_path)
    path = recording / "machine.yaml"
    path.write_text(path.read_text().replace("'0x120000'", "'0x048000'").replace("0x120000", "0x048000"))
    profile = probe(RecordedMachine(recording))
    assert [device.pci_device for device in profile.devices] == ["cabc:0371"] * 4


def test_cnmon_columns_follow_the_header() -> None:
    new, old = (cambricon.parse_table(SAMPLES[f"cnmon {one}"][1]) for one in ("5.10.22", "4.20.11"))
    assert (new[3].name, new[3].address, new[3].memory_mib) == ("MLU370-X8", "0000:8c:00.0", 23374)
    # 4.20 prints driver and virtual memory where 5.10 prints bus id and mode.
    assert (old[1].name, old[1].address, old[1].memory_mib) == ("MLU370-X4", None, 23308)
