# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt presets list|show|explain``."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from sage_kv_connector.cli.main import app
from sage_kv_connector.config import KVTransportConfig, presets


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["presets", *words], env={"COLUMNS": "160"})


def test_list_and_explain() -> None:
    assert set(json.loads(run("list", "--json").stdout)) == set(presets())
    for name in presets():
        assert name in run("list").stdout
        shown = run("explain", name)
        assert shown.exit_code == 0 and "hardware" in shown.stdout
    unknown = run("explain", "fast")
    assert unknown.exit_code == 2 and "preset is 'fast'; allowed: high-bw" in unknown.stderr


def test_show_layers_and_writes(tmp_path: Path) -> None:
    file, out = tmp_path / "mine.yaml", tmp_path / "kv_transport.yaml"
    file.write_text("chunk_size: 8192\n")
    words = ["show", "high-bw", "--config", str(file), "--set", "lease-s=9", "--write", str(out), "--json"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["options"]["chunk_size"] == 8192 and shown["origins"]["chunk_size"] == str(file)
    assert shown["origins"]["prefetch_depth"] == "preset high-bw" and shown["origins"]["lease_s"] == "--set"
    assert shown["origins"]["port"] == "default"
    written = KVTransportConfig.from_file(out)
    assert (written.chunk_size, written.lease_s, written.preset) == (8192, 9, "high-bw")
    assert "chunk_size" in run("show").stdout


def test_bad_overrides_are_named() -> None:
    for words, says in (
        (["--set", "lease_s=-1"], "lease_s is -1 (from --set); allowed: a number above 0"),
        (["--set", "nothing"], "is not of the form key=value"),
        (["fast"], "preset is 'fast' (from --set); allowed: high-bw"),
    ):
        result = run("show", *words)
        assert result.exit_code == 2 and says in result.stderr
    assert "secret" in run("show", "--set", "secret=mine").stdout
    assert "mine" not in run("show", "--set", "secret=mine").stdout
