# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.engine import core as core_module
from sage_kv_connector.engine.core import EngineCore
from tests.engine.memory_backend import MemoryBackend

Cores = Callable[..., EngineCore]


def made_cores(**defaults: Any) -> Iterator[Cores]:
    """Makes engines that run; closes them at the end."""
    cores: list[EngineCore] = []

    def make(options: dict[str, Any] | None = None, **kwargs: Any) -> EngineCore:
        core = EngineCore(KVTransportConfig.load({**defaults, **(options or {})}), **kwargs)
        core.start()
        cores.append(core)
        return core

    yield make
    for core in cores:
        core.close()


@pytest.fixture
def make_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cores]:
    """Engines over the in-process backend."""
    monkeypatch.setattr(core_module, "enabled_backends", lambda config, **_: ("memory",))
    monkeypatch.setattr(core_module, "create_backend", lambda name, config: MemoryBackend())
    yield from made_cores()


@pytest.fixture(params=["shm", "tcp"])
def make_native_core(request: pytest.FixtureRequest) -> Iterator[Cores]:
    """Engines over a backend whose lanes convert."""
    yield from made_cores(backend=request.param, host="127.0.0.1")
