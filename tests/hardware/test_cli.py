# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt probe`` as users call it."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from sage_kv_connector.cli.main import app
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.hardware.probing.profile import published_schema
from tests.hardware.recorded import NAMES, RECORDINGS, copied, file_of_call


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def test_this_machine_fits_the_published_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    result = run("probe", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    jsonschema.Draft202012Validator(published_schema()).validate(document)
    assert document["origin"] == "this machine"
    KVTransportConfig.load(document["recommendation"]["config"])


@pytest.mark.parametrize("name", NAMES)
def test_recordings_are_shown_and_printed(name: str) -> None:
    shown = run("probe", "--from-recording", str(RECORDINGS / name))
    assert shown.exit_code == 0 and "recommended" in shown.stdout
    printed = run("probe", "--from-recording", str(RECORDINGS / name), "--json")
    assert json.loads(printed.stdout)["recommendation"]["reasons"]


def test_a_broken_recording_fails_with_its_line(tmp_path: Path) -> None:
    recording = copied("kunlunxin", tmp_path)
    path = file_of_call(recording, "xpu-smi", "topo", "-m")
    path.write_text(path.read_text().replace("XPU2\tXL\tXL", "XPU2\tXL\t[red]"))
    result = run("probe", "--from-recording", str(recording), "--json")
    assert result.exit_code == 1 and not result.stdout
    assert "`xpu-smi topo -m` line 4: 'XPU2\\tXL\\t[red]" in result.stderr
    assert "a link's word in column XPU1, not '[red]'" in result.stderr
    without = run("probe", "--from-recording", str(recording), "--without", "xpu-smi")
    assert without.exit_code == 0 and "not found here" in without.stdout


def test_a_recording_is_made_and_read_even_if_a_tool_s_output_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "npu-smi"
    tool.write_text("#!/bin/sh\necho '| a table | of next year |'\n")
    tool.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    made = run("probe", "--record", str(tmp_path / "mine"), "--about", "a test")
    assert made.exit_code == 1 and "npu-smi info" in made.stderr
    again = run("probe", "--from-recording", str(tmp_path / "mine"))
    assert again.exit_code == 1 and "| a table | of next year |" in again.stderr
    twice = run("probe", "--record", str(tmp_path / "mine"))
    assert twice.exit_code == 1 and "name another directory" in twice.stderr


def test_the_recommended_options_are_written(tmp_path: Path) -> None:
    path = tmp_path / "kv_transport.yaml"
    result = run("probe", "--from-recording", str(RECORDINGS / "nvidia"), "--write", str(path))
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(path.read_text())["preset"] == "high-bw"
    assert KVTransportConfig.from_file(path).preset == "high-bw"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--from-recording", "/nowhere"], "a recording has a machine.yaml"),
        (
            ["--from-recording", str(RECORDINGS / "nvidia"), "--measure"],
            "can be neither measured nor recorded",
        ),
        (["--from-recording", str(RECORDINGS / "nvidia"), "--write", "/nowhere/x.yaml"], "can't be written"),
    ],
)
def test_what_can_t_be_done_is_said(words: list[str], says: str) -> None:
    result = run("probe", *words)
    assert result.exit_code == 1 and says in result.stderr


def test_measure_on_this_machine() -> None:
    result = run("probe", "--measure", "--json")
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)["measurements"]
    assert {one["name"] for one in measured} >= {"memcpy", "loopback"}
    assert all(one["value"] > 0 for one in measured)
