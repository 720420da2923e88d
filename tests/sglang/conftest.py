# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sage_kv_connector.integrations.sglang.options import CONFIG_ENV
from tests.sglang.on_device import MEMORY, Serve, Server
from tests.sglang.stand_in import Surroundings, install
from tests.vendors.rig import Rig


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    monkeypatch.setenv(CONFIG_ENV, "backend=tcp,host=127.0.0.1,same_weights=false")
    return install(monkeypatch)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, surroundings: Surroundings) -> Iterator[Serve]:
    servers: list[Server] = []

    def make(*what: Any, **more: Any) -> Server:
        servers.append(Server(monkeypatch, surroundings, *what, **more))
        return servers[-1]

    yield make
    for server in servers:
        if server.rig is not None:
            server.rig.control.release()
        server.close()


@pytest.fixture(params=["nvidia", "ascend"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param, memory_bytes=MEMORY)
