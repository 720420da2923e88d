# SPDX-License-Identifier: Apache-2.0
"""The card in an app like SAGE's gateway; the real one is tried in integration_tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer
from fastapi import Depends, FastAPI, HTTPException
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from sage_kv_connector.cli.sage_serve import add_to_serve
from sage_kv_connector.config import CONFIG_FILE_ENV
from sage_kv_connector.integrations.sage.gateway import PREFIX, create_app, mount_card
from sage_kv_connector.telemetry.reading.sources import Found
from sage_kv_connector.telemetry.reading.token import TOKEN_ENV, reading_token
from sage_kv_connector.telemetry.recording.snapshot import Snapshot
from tests.telemetry.http_reader import reader


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """What ``sagellm_gateway.create_app`` hands out: always the same app."""
    package, server = ModuleType("sagellm_gateway"), ModuleType("sagellm_gateway.server")
    app = FastAPI()
    server.app = app  # type: ignore[attr-defined]
    package.create_app = lambda: app  # type: ignore[attr-defined]
    package.server = server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sagellm_gateway", package)
    monkeypatch.setitem(sys.modules, "sagellm_gateway.server", server)
    return app


def served(app: FastAPI, prefix: str = PREFIX) -> TestClient:
    client = reader(app)
    assert client.get(prefix).url.path == f"{prefix}/"
    assert "<kv-transport-card" in client.get(f"{prefix}/").text
    return client


def test_one_call_mounts_the_card_and_more_change_nothing() -> None:
    app, found = FastAPI(), Found([Snapshot("e", 0, 1, 0, 1, (), ())])
    mount_card(app, lambda: found, "/kv")
    routes = len(app.routes)
    mount_card(app, lambda: Found([]), "/kv")
    assert len(app.routes) == routes
    assert [one["engine"] for one in served(app, "/kv").get("/kv/card.json").json()["engines"]] == ["e"]


@pytest.mark.parametrize("prefix", ["kv", "", "/", "/kv/"])
def test_a_prefix_that_is_no_path_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"prefix is '.*'; it must begin with / and not end with it"):
        mount_card(FastAPI(), prefix=prefix)


def test_dependencies_guard_page_and_numbers() -> None:
    def nobody() -> None:
        raise HTTPException(401)

    app = FastAPI()
    mount_card(app, lambda: Found([]), dependencies=[Depends(nobody)])
    client = TestClient(app)
    assert {client.get(f"{PREFIX}/{name}").status_code for name in ("", "card.json", "card.js")} == {401}


def test_without_dependencies_the_exporters_rule_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = f"{PREFIX}/card.json"
    app = FastAPI()
    mount_card(app, lambda: Found([]))
    assert reader(app).get(numbers).is_success
    assert reader(app, host="10.0.0.7").get(numbers).status_code == 403
    assert reader(app, "http://attacker.example").get(numbers).status_code == 421
    monkeypatch.setenv(TOKEN_ENV, "a token")
    app = FastAPI()
    mount_card(app, lambda: Found([]))
    afar = reader(app, "http://gateway.example", "10.0.0.7")
    refused = afar.get(numbers)
    assert refused.status_code == 401 and refused.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert reader(app).get(numbers).status_code == 401
    assert afar.get(numbers, auth=("anybody", "a token")).is_success
    assert afar.get(numbers, headers={"Authorization": "Bearer a token"}).is_success


def test_no_dependencies_leave_it_open() -> None:
    app = FastAPI()
    mount_card(app, lambda: Found([]), dependencies=())
    assert reader(app, "http://gateway.example", "10.0.0.7").get(f"{PREFIX}/card.json").is_success


def test_a_gateway_made_by_our_factory_has_it(gateway: FastAPI) -> None:
    assert create_app() is gateway
    served(gateway)


def sage_like() -> typer.Typer:
    app, llm = typer.Typer(), typer.Typer()
    llm.command("serve")(lambda: None)
    llm.command("info")(lambda: None)
    app.add_typer(llm, name="llm")
    add_to_serve(app)
    return app


def test_sage_llm_serve_mounts_it_by_itself(gateway: FastAPI) -> None:
    for _ in range(2):
        result = CliRunner().invoke(sage_like(), ["llm", "serve"])
        assert result.exit_code == 0
        assert "its card is at /kv-transport/ of the gateway, for this machine alone" in result.stderr
    served(gateway)


def test_a_secret_of_serves_own_options_guards_it(gateway: FastAPI, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret of thirty-two characters")
    secret.chmod(0o600)
    words = [
        "--kv-transport",
        f"secret_file={secret}",
        "--kv-transport",
        "backend=tcp",
        "--kv-transport-file",
        str(tmp_path / "kvt.yaml"),
    ]
    try:
        result = CliRunner().invoke(sage_like(), ["llm", "serve", *words])
        assert result.exit_code == 0, result.stderr
        assert "for whoever brings the token of `sage-kvt exporter --print-token`" in result.stderr
        numbers = f"{PREFIX}/card.json"
        assert reader(gateway).get(numbers).status_code == 401
        token = reading_token()
        assert reader(gateway).get(numbers, auth=("", token)).is_success
    finally:
        os.environ.pop(CONFIG_FILE_ENV, None)


def test_without_a_gateway_serve_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sagellm_gateway.server", None)
    result = CliRunner().invoke(sage_like(), ["llm", "serve"])
    assert result.exit_code == 0 and "KV transport: no card: " in result.stderr
