# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sage_kv_connector.engine import core as core_module
from sage_kv_connector.store import client as client_module
from sage_kv_connector.store.backoff import Backoff
from sage_kv_connector.store.client import StoreClient
from tests.engine.conftest import make_core
from tests.engine.memory_backend import MemoryBackend

__all__ = ["make_core"]


@pytest.fixture
def memory_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores, engines and clients stand on the in-process backend."""
    monkeypatch.setattr(core_module, "enabled_backends", lambda config, **_: ("memory",))
    monkeypatch.setattr(client_module, "enabled_backends", lambda config: ("memory",))
    monkeypatch.setattr(client_module, "order_addresses", lambda addresses, node, enabled: ())
    monkeypatch.setattr(core_module, "create_backend", lambda name, config: MemoryBackend())


@pytest.fixture
def in_process_client(memory_backend: None) -> Iterator[Callable[..., StoreClient]]:
    clients: list[StoreClient] = []

    def make(*addresses: str, deadline_s: float = 2.0) -> StoreClient:
        clients.append(StoreClient(addresses, deadline_s=deadline_s, backoff=Backoff(0.05, 0.1)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
