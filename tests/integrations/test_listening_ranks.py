# SPDX-License-Identifier: Apache-2.0
"""The bootstrap server of a vLLM engine listens where its transport does, and tells nobody the secret."""

from __future__ import annotations

import json
import logging
import urllib.request
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from sage_kv_connector.config import SECRET_ENV, SECRET_FILE_ENV, KVTransportConfig
from sage_kv_connector.integrations.vllm.listening_ranks import ListeningRanks
from sage_kv_connector.integrations.vllm.metadata import SageKVHandshakeMetadata

SECRET = "correct-horse-battery"
PARALLEL = SimpleNamespace(
    data_parallel_size=1, data_parallel_index=0, tensor_parallel_size=1, pipeline_parallel_size=1
)
RANKS = {0: SageKVHandshakeMetadata(("tcp://127.0.0.1:1",), "node", "digest")}


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({}, "127.0.0.1"),
        ({"secret": SECRET}, "0.0.0.0"),
        ({"secret": SECRET, "host": "127.0.0.1"}, "127.0.0.1"),
    ],
)
def test_it_listens_where_the_transport_does(
    options: dict[str, str], host: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (SECRET_ENV, SECRET_FILE_ENV):
        monkeypatch.delenv(name, raising=False)
    config = KVTransportConfig.load({**options, "bootstrap_port": 0})
    with caplog.at_level(logging.INFO), closing(ListeningRanks("engine", config, PARALLEL)) as listening:
        listening.set_ranks(RANKS)
        url = caplog.messages[-1].rpartition(" at ")[2]
        assert url.startswith(f"http://{host}:")
        port = int(url.removesuffix("/query").rpartition(":")[2])
        assert listens_at(port) == {host}
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/query", timeout=10) as response:
            told = json.load(response)
        assert told["0"]["engine_id"] == "engine" and SECRET not in json.dumps(told)


def listens_at(port: int) -> set[str]:
    """The IPv4 addresses of this machine's sockets that listen on a port, from the kernel's table."""
    addresses = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        number, _, there = local.partition(":")
        if state == "0A" and int(there, 16) == port:
            addresses.add(".".join(str(byte) for byte in reversed(bytes.fromhex(number))))
    return addresses
