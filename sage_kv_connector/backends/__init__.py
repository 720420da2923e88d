# SPDX-License-Identifier: Apache-2.0
"""Transports behind one protocol (``base``); ``create_backend`` is the only place that knows them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage_kv_connector.backends.base import Backend

if TYPE_CHECKING:
    from sage_kv_connector.config import KVTransportConfig


def create_backend(name: str, config: KVTransportConfig) -> Backend:
    """Start a backend with the options of ``config``; its module is imported only now."""
    if name == "shm":
        from sage_kv_connector.backends.shm import ShmBackend

        return ShmBackend.from_config(config)
    if name == "tcp":
        from sage_kv_connector.backends.tcp import TcpBackend

        return TcpBackend.from_config(config)
    raise ValueError(f"backend {name!r} is not part of this release; allowed: shm, tcp")
