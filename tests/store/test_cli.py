# SPDX-License-Identifier: Apache-2.0
"""``sage-kvt store`` and ``sage-kvt bench store`` as users call them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sage_kv_connector.cli.main import app
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.launch.store import store_process
from sage_kv_connector.store.client import StoreClient
from tests.store.pages import Pages


def test_it_says_where_it_is_and_at_its_end_what_it_did() -> None:
    with store_process("1MiB", options=["lease_s=3"]) as store:
        assert [address.partition("://")[0] for address in store.addresses] == ["shm", "tcp"]
        client = StoreClient([store.address("tcp")], KVTransportConfig(host="127.0.0.1"))
        assert client.put(["a"], Pages(client, 1, 500, seed=1).items) == [True]
        client.close()
        store.popen.send_signal(signal.SIGTERM)
        assert store.popen.stdout is not None
        last = json.loads(store.popen.stdout.read().splitlines()[-1])
        assert store.popen.wait(10) == 0
    assert last["address"] == store.addresses
    assert last["stats"]["put_entries"] == 1 and last["stats"]["put_bytes"] == 1000


def test_people_read_it_too() -> None:
    command = [
        sys.executable,
        "-c",
        "from sage_kv_connector.cli.main import app; app()",
        "store",
        "--capacity",
        "1MiB",
    ]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    assert "keeps up to 1.0 MiB of KV at shm://" in popen.stdout.readline()
    popen.send_signal(signal.SIGINT)
    rest, _ = popen.communicate(timeout=10)
    assert rest.startswith("ended: capacity 1048576") and popen.returncode == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--capacity", "lots"], "capacity is 'lots'"),
        (["--capacity", "900TiB"], "this machine has"),
        (["--capacity", "10"], "capacity is 10 bytes"),
        (["--capacity", "1MiB", "--host", "0.0.0.0"], "a shared secret is needed"),
        (["--capacity", "1MiB", "--option", "color=red"], "color"),
        (["--capacity", "1MiB", "--option", "color"], "'color' is not of the form key=value"),
        (["--capacity", "1MiB", "--option", "backend=pigeon"], "allowed: auto"),
        (["--capacity", "1MiB", "--host", "192.0.2.1", "--option", "secret=x"], "192.0.2.1"),
    ],
)
def test_what_can_not_be_is_named(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SAGE_KVT_SECRET", "SAGE_KVT_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(app, ["store", *words])
    assert result.exit_code == 1 and says in result.output


def test_the_benchmark_compares_what_it_moved() -> None:
    words = ["bench", "store", "--page-bytes", "5000", "--pages", "8", "--repeats", "1", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["verified"] and figures["total_bytes"] == 40_000
    for backend in ("shm", "tcp"):
        assert figures[backend]["put_gbytes_per_s"] > 0 and figures[backend]["get_gbytes_per_s"] > 0
