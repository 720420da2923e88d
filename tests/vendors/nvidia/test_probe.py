# SPDX-License-Identifier: Apache-2.0
"""What this vendor's probe makes of machines and of its tools' outputs."""

from __future__ import annotations

from pathlib import Path

from sage_kv_connector.hardware.probing.recording import RecordedMachine
from sage_kv_connector.hardware.report.descriptors import find_descriptor
from sage_kv_connector.hardware.report.topology import probe
from sage_kv_connector.vendors.nvidia import probe as nvidia
from tests.hardware.recorded import copied, file_of_call, link, nodes, notes, profile_of, speed


def test_nvidia() -> None:
    profile = profile_of("nvidia")
    six = link(profile, "nvidia0", "nvidia3")
    assert (six.kind, six.path, speed(six)) == ("nvlink", "NV6", 150e9)
    assert six.bytes_per_s and "6 × 2.5e+10 B/s (H100 data sheet" in six.bytes_per_s.source
    # A card at rest shows 2.5 GT/s; what it can do is taken, and no note made of it.
    assert speed(link(profile, "nvidia0", "host")) == 63e9 and "GT/s" not in notes(profile)
    assert [port.active for port in profile.rdma] == [False, True, True, True]
    flat = profile_of("nvidia_pcie")
    assert link(flat, "nvidia0", "nvidia1").path == "NODE" and nodes(flat) == [0, 0]


def test_unknown_words_of_links_are_kept_and_said(tmp_path: Path) -> None:
    recording = copied("nvidia", tmp_path)
    path = file_of_call(recording, *nvidia.TOPOLOGY)
    path.write_text(path.read_text().replace("NV6", "C2C"))
    profile = probe(RecordedMachine(recording))
    assert link(profile, "nvidia0", "nvidia1").kind == "unknown"
    assert "C2C, a word we don't know" in notes(profile)


def test_a_card_that_is_new_is_in_no_table() -> None:
    assert find_descriptor("nvidia", "ffff", "something new") is None
