# SPDX-License-Identifier: Apache-2.0
"""``--kv-transport`` on a Typer app built like SAGE's; the real one is tried in integration_tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sage_kv_connector.cli import sage_app
from sage_kv_connector.cli.sage_serve import add_to_serve, configure
from sage_kv_connector.config import CONFIG_FILE_ENV, KVTransportConfig, presets
from tests.hardware.recorded import RECORDINGS

called: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(CONFIG_FILE_ENV, "")
    monkeypatch.chdir(tmp_path)
    called.clear()
    yield
    os.environ.pop(CONFIG_FILE_ENV, None)


def sage_like() -> typer.Typer:
    llm = typer.Typer()

    @llm.command("serve")
    def serve(
        model: str | None = typer.Option(None, "--model", "-m"), port: int = typer.Option(8000, "--port")
    ) -> None:
        """Start it."""
        called.append({"model": model, "port": port, "file": os.environ.get(CONFIG_FILE_ENV)})

    @llm.command("info")
    def info() -> None:
        """Another command."""

    app, advanced = typer.Typer(), typer.Typer()
    advanced.add_typer(llm, name="llm")
    app.add_typer(advanced, name="advanced")
    app.add_typer(llm, name="llm")
    return app


def test_options_reach_the_file_the_environment_and_nothing_else(tmp_path: Path) -> None:
    app = sage_like()
    sage_app.register(app)
    sage_app.register(app)  # twice does no harm
    assert sage_app.problems == []
    words = ["--kv-transport", "preset=high-bw", "--kv-transport", "backend=tcp", "--kv-transport"]
    for way in (["llm"], ["advanced", "llm"]):
        result = CliRunner().invoke(app, [*way, "serve", "-m", "x", *words, "target-dtype=fp8_e4m3"])
        assert result.exit_code == 0, result.output
    file = tmp_path / "kv_transport.yaml"
    assert called == [{"model": "x", "port": 8000, "file": str(file)}] * 2
    written = KVTransportConfig.from_file(file)
    assert (written.preset, written.backend, written.target_dtype) == ("high-bw", "tcp", "fp8_e4m3")
    assert written.chunk_size == presets()["high-bw"]["settings"]["chunk_size"]
    named = KVTransportConfig.load({"config_file": file})
    assert KVTransportConfig.load() == named.model_copy(update={"config_file": None})


def test_without_our_options_serve_is_as_it_was(tmp_path: Path) -> None:
    app = sage_like()
    add_to_serve(app)
    assert CliRunner().invoke(app, ["llm", "serve", "--port", "9"]).exit_code == 0
    assert called == [{"model": None, "port": 9, "file": ""}] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("backend=carrier-pigeon", "backend is 'carrier-pigeon' (from --kv-transport); allowed: auto"),
        ("preset=fast", "preset is 'fast' (from --kv-transport); allowed: high-bw"),
        ("target-dtype=fp9", "target_dtype is 'fp9'"),
        ("nothing", "option 'nothing' is not of the form key=value"),
        ("secret=mine", "name a secret_file"),
    ],
)
def test_what_is_refused_is_named_and_nothing_starts(word: str, says: str) -> None:
    app = sage_like()
    add_to_serve(app)
    result = CliRunner().invoke(app, ["llm", "serve", "--kv-transport", "lease-s=9", "--kv-transport", word])
    assert result.exit_code == 2 and says in result.stderr.replace("\n", " ")
    assert not called and "mine" not in result.output.replace("name", "")


def test_a_bad_option_of_a_file_names_the_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("port: 70000\n")
    app = sage_like()
    add_to_serve(app)
    result = CliRunner().invoke(app, ["llm", "serve", "--kv-transport", f"config_file={mine}"])
    assert result.exit_code == 2 and not called
    assert f"port is 70000 (from {mine}); allowed: 0 to 65535" in result.stderr


def test_an_engine_that_is_not_started_here_is_refused_by_name() -> None:
    app = sage_like()
    add_to_serve(app)
    result = CliRunner().invoke(app, ["llm", "serve", "--kv-engine", "sglang"])
    shown = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and not called
    assert "'sglang' is not one of 'none', 'vllm'" in shown, shown


@pytest.mark.parametrize(
    ("machine", "backend"), [("wsl2", "tcp"), ("nvidia_pcie", "auto"), ("host_only", "auto")]
)
def test_the_hardware_chooses_a_backend_where_none_is_named(
    machine: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sage_kv_connector.backends import BACKENDS
    from sage_kv_connector.hardware.report import run

    real = run.run_probe
    monkeypatch.setattr(run, "run_probe", lambda: real(from_recording=RECORDINGS / machine))
    config = configure(["lease-s=9"], tmp_path / "kv_transport.yaml")
    assert config.backend == ("pcie" if "pcie" in BACKENDS and machine != "host_only" else backend)
    assert configure(["preset=low-cost", "backend=shm"], tmp_path / "kv_transport.yaml").backend == "shm"


def test_an_app_of_another_shape_is_told_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()
    app.add_typer(typer.Typer(), name="models")
    sage_app.register(app)
    assert "no group 'llm' with a command 'serve' among models" in sage_app.problems[0]
    assert "WARNING: this isage-cli does not take --kv-transport" in capsys.readouterr().err


@given(
    lease=st.floats(0.1, 604_800), chunk=st.integers(0, 64 << 20), preset=st.sampled_from([None, *presets()])
)
def test_any_options_come_back_from_the_file(
    tmp_path_factory: pytest.TempPathFactory, lease: float, chunk: int, preset: str | None
) -> None:
    path = tmp_path_factory.mktemp("kvt") / "kv_transport.yaml"
    words = [
        f"lease-s={lease!r}",
        f"chunk-size={chunk}",
        "backend=tcp",
        *([f"preset={preset}"] if preset else []),
    ]
    written = configure(words, path)
    assert KVTransportConfig.from_file(path) == written == KVTransportConfig.from_words(words)
    os.environ.pop(CONFIG_FILE_ENV, None)
