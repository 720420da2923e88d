# SPDX-License-Identifier: Apache-2.0
"""The project's environment: what is added to it leaves what was built in it, and what was counted with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts import environment


def _layer(folder: Path, name: str) -> Path:
    """A package that says its name, and a console script."""
    layer = folder / f"{name}-0123"
    (layer / "bin").mkdir(parents=True)
    (layer / f"{name}.py").write_text(f"NAME = {name!r}\n")
    (layer / "bin" / f"say-{name}").write_text(f"#!/usr/bin/python3\nimport {name}\nprint({name}.NAME)\n")
    return layer


def _said(venv: Path, name: str) -> str:
    return subprocess.run([venv / "bin" / f"say-{name}"], capture_output=True, text=True).stdout.strip()


def test_a_layer_is_added_and_what_was_built_stays(tmp_path: Path) -> None:
    venv, one, two = tmp_path / ".venv", _layer(tmp_path, "one"), _layer(tmp_path, "two")
    environment.make_venv(venv, [one])
    built = venv / "built"
    built.write_text("a digest")
    environment.make_venv(venv, [two, one])
    assert built.read_text() == "a digest" and environment.known_layers(venv) == [two, one]
    assert (_said(venv, "one"), _said(venv, "two")) == ("one", "two")


def test_a_layer_that_is_gone_makes_a_new_one(tmp_path: Path) -> None:
    venv, one, two = tmp_path / ".venv", _layer(tmp_path, "one"), _layer(tmp_path, "two")
    environment.make_venv(venv, [one])
    (venv / "built").write_text("a digest")
    environment.make_venv(venv, [two])
    assert not (venv / "built").exists()
    assert not (venv / "bin" / "say-one").exists() and _said(venv, "two") == "two"


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one source, built by nothing; a file of counts."""
    (tmp_path / "CMakeLists.txt").write_text("project(one)")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "MEASURED", tmp_path / "build" / "measured")
    done = subprocess.CompletedProcess[str]([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: done)
    (tmp_path / ".venv-measured").mkdir()
    environment.build_package(tmp_path / ".venv-measured")
    path = tmp_path / "build" / "measured" / "extension" / "one.gcda"
    path.parent.mkdir(parents=True)
    path.write_text("counts")
    return path


def test_counts_of_the_same_sources_are_kept_when_it_is_built_again(counts: Path, tmp_path: Path) -> None:
    (tmp_path / ".venv-measured" / "built").unlink()
    environment.build_package(tmp_path / ".venv-measured")
    assert counts.exists()


def test_counts_of_other_sources_are_not(counts: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text("project(two)")
    environment.build_package(tmp_path / ".venv-measured")
    assert not counts.exists()
