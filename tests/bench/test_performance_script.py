# SPDX-License-Identifier: Apache-2.0
"""``make performance``: a section's commands are run and kept; one that fails leaves its file as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sage_kv_connector.bench.performance.page import kept
from sage_kv_connector.bench.performance.sections import Section
from scripts import performance


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sections of one module each, of which the second one ends with status 1."""
    (tmp_path / "good.py").write_text(
        "import sys\nprint('progress')\nprint('{\"words\": %d}' % len(sys.argv))\n"
    )
    (tmp_path / "bad.py").write_text("import sys\nprint('{}')\nsys.exit(1)\n")
    sections = {name: Section((f"{name} --size 1",), lambda results: iter(())) for name in ("bad", "good")}
    monkeypatch.setattr(performance, "SECTIONS", sections)
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def _main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["performance", *words])
    return performance.main()


def test_what_a_command_prints_last_is_kept_with_where_and_when(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _main(monkeypatch, "good") == 0
    said = json.loads(kept(results, "good").read_text())
    assert said["runs"] == [{"command": "good --size 1", "result": {"words": 4}}]
    assert said["machine"]["cores"] and said["commit"] and said["date"]


def test_a_failure_leaves_its_file_and_the_others_are_measured(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept(results, "bad").write_text("as it was")
    assert _main(monkeypatch) == 1
    assert kept(results, "bad").read_text() == "as it was"
    assert kept(results, "good").exists() and "bad failed" in capsys.readouterr().err


def test_an_unknown_section_is_named(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _main(monkeypatch, "goo")
    assert "NAME is 'goo', allowed: bad, good" in capsys.readouterr().err
