# SPDX-License-Identifier: Apache-2.0
"""The card's charts are built where npm is and reaches a registry; elsewhere a build goes on without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import build_card


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test builds, with what an earlier build left."""
    where = tmp_path / "card" / "built"
    where.mkdir(parents=True)
    (where / "charts.js").write_text("of an earlier build")
    monkeypatch.setattr(build_card, "BUILT", where)
    monkeypatch.setattr(build_card, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("sys.argv", ["build_card"])
    return where


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """These are all the commands that there are."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_without_npm_the_build_goes_on_and_old_charts_go(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(tmp_path / "bin", monkeypatch)
    assert build_card.main() == 0 and not built.exists()
    assert "npm was not found" in capsys.readouterr().err


def test_a_registry_that_does_not_answer_is_no_failed_build(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands(tmp_path / "bin", monkeypatch, npm="echo ENOTFOUND; exit 7", node="exit 0")
    assert build_card.main() == 0 and not built.exists()
    said = capsys.readouterr().err
    assert "npm ci failed with status 7: ENOTFOUND" in said and "built without charts" in said
    assert build_card.npm_packages() is None, "what failed is not taken for installed"


def test_the_lock_file_names_no_host_and_each_package_by_its_digest() -> None:
    text = (build_card.CARD / "package-lock.json").read_text()
    assert "://" not in text
    packages = {name: one for name, one in json.loads(text)["packages"].items() if name}
    assert {"node_modules/uplot", "node_modules/esbuild", "node_modules/axe-core"} <= set(packages)
    assert all(one["integrity"].startswith("sha512-") for one in packages.values())
