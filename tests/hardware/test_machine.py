# SPDX-License-Identifier: Apache-2.0
"""Reading live and recorded machines; tools that hang, fail or are missing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sage_kv_connector.hardware.probing.machine import LiveMachine, ToolState
from sage_kv_connector.hardware.probing.recording import RecordedMachine, RecordingError, RecordingMachine
from sage_kv_connector.hardware.probing.sysfs import cpu_set, node_of_cpus, pcie_bytes_per_s, platform
from sage_kv_connector.hardware.report.topology import probe
from tests.hardware.recorded import NAMES, RECORDINGS, profile_of


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory first on PATH."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def make_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_tool_that_hangs_is_stopped_with_its_children(tools: Path) -> None:
    make_tool(tools, "npu-smi", "sleep 60 & sleep 60")
    begin = time.monotonic()
    answer = LiveMachine(tool_seconds=0.3).run(["npu-smi", "info"])
    assert answer.state is ToolState.hung and time.monotonic() - begin < 5


def test_a_tool_s_answer_status_and_errors(tools: Path) -> None:
    make_tool(tools, "cnmon", "echo out; echo err >&2; exit 3")
    answer = LiveMachine().run(["cnmon"])
    assert (answer.status, answer.output, answer.errors, answer.usable) == (3, "out\n", "err\n", False)
    assert LiveMachine().run(["no-such-tool"]).state is ToolState.missing


def test_a_tool_that_can_t_be_started_is_an_answer(tools: Path) -> None:
    (tools / "xpu-smi").write_bytes(b"\x7fELF not really")
    (tools / "xpu-smi").chmod(0o755)
    answer = LiveMachine().run(["xpu-smi"])
    assert answer.status == 126 and "Exec format error" in answer.errors


def test_absent_paths_are_none() -> None:
    machine = LiveMachine()
    assert machine.read("/no/such/file") is None
    assert machine.names("/no/such/directory") == []
    assert machine.target("/no/such/link") is None


def test_this_machine_is_probed_and_recorded(tmp_path: Path) -> None:
    recorder = RecordingMachine(LiveMachine())
    live = probe(recorder)
    recorder.save(tmp_path / "me", "the machine of a test")
    again = probe(RecordedMachine(tmp_path / "me"))
    assert again.model_dump(exclude={"origin"}) == live.model_dump(exclude={"origin"})
    with pytest.raises(RecordingError, match=r"machine\.yaml exists; name another directory"):
        recorder.save(tmp_path / "me", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_of_a_recording_says_the_same(name: str, tmp_path: Path) -> None:
    recorder = RecordingMachine(RecordedMachine(RECORDINGS / name))
    probe(recorder)
    recorder.save(tmp_path / name, "a copy")
    copy = probe(RecordedMachine(tmp_path / name))
    original = profile_of(name)
    assert copy.devices == original.devices and copy.links == original.links
    assert copy.rdma == original.rdma and copy.interfaces == original.interfaces


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, r"No such file or directory; a recording has a machine\.yaml"),
        ("recording: [", "is not YAML"),
        ("recording: 2\n", "recording: Input should be less than or equal to 1"),
        ("recording: 1\nfile: {}\n", "file: Extra inputs are not permitted"),
        ("recording: 1\ncalls: [{argv: []}]\n", r"calls\.0\.argv"),
        ("recording: 1\ncalls: [{argv: [cnmon], state: dead}]\n", r"calls\.0\.state: .*'answered'"),
        ("just text\n", "the whole file"),
        ("", "the whole file"),
    ],
)
def test_bad_recordings_are_named(manifest: str | None, says: str, tmp_path: Path) -> None:
    if manifest is not None:
        (tmp_path / "machine.yaml").write_text(manifest)
    with pytest.raises(RecordingError, match=says):
        RecordedMachine(tmp_path)


def test_a_missing_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_text("recording: 1\ncalls: [{argv: [cnmon], output: gone.txt}]\n")
    with pytest.raises(RecordingError, match=r"gone\.txt: No such file"):
        RecordedMachine(tmp_path).run(["cnmon"])


def test_calls_that_were_not_recorded_are_told_from_missing_tools() -> None:
    machine = RecordedMachine(RECORDINGS / "cambricon")
    assert machine.run(["cnmon", "new"]).errors == "this call is not in the recording"
    assert machine.run(["hy-smi"]).state is ToolState.missing


def test_numbers_of_cpus_and_links() -> None:
    assert cpu_set("0-2,8, 10-11") == {0, 1, 2, 8, 10, 11}
    assert cpu_set("all") == set() and cpu_set("") == set()
    host = platform(RecordedMachine(RECORDINGS / "kunlunxin"))
    assert node_of_cpus("0-95,192-287", host.numa_nodes) == 0
    assert node_of_cpus("0-383", host.numa_nodes) is None
    assert pcie_bytes_per_s(16, 16) == pytest.approx(31.5e9, rel=1e-3)
    assert pcie_bytes_per_s(2.5, 1) == 250e6
    assert pcie_bytes_per_s(64, 16) == pytest.approx(121e9, rel=1e-3)
