# SPDX-License-Identifier: Apache-2.0
"""Transports behind one protocol (``base``). ``BACKENDS`` is the one place that knows them all."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from sage_kv_connector.backends.base import Backend, Capabilities

if TYPE_CHECKING:
    from sage_kv_connector.config import KVTransportConfig

#: Name → module and class; ``backend=auto`` prefers them in this order. To add a backend, add a line.
BACKENDS = {
    "pcie": ("sage_kv_connector.backends.pcie.backend", "PcieBackend"),
    "shm": ("sage_kv_connector.backends.shm.backend", "ShmBackend"),
    "tcp": ("sage_kv_connector.backends.tcp.backend", "TcpBackend"),
}


class BackendClass(Protocol):
    """What ``BACKENDS`` names: a class that makes backends from the options."""

    capabilities: Capabilities

    def from_config(self, config: KVTransportConfig) -> Backend: ...


def backend_class(name: str) -> BackendClass:
    """Import a backend's module. Raises ValueError for a name that is not in ``BACKENDS``."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not part of this release; allowed: {', '.join(BACKENDS)}")
    module, class_name = BACKENDS[name]
    found: BackendClass = getattr(import_module(module), class_name)
    return found


def create_backend(name: str, config: KVTransportConfig) -> Backend:
    """Start a backend with the options of ``config``; its module is imported only now."""
    return backend_class(name).from_config(config)
