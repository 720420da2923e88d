# SPDX-License-Identifier: Apache-2.0
"""Where an engine listens, and under which address its peers reach it."""

from __future__ import annotations

import socket

from sage_kv_connector.backends.base import Backend
from sage_kv_connector.config import SECRET_ENV, KVTransportConfig
from sage_kv_connector.contract.peer import bracket, is_loopback


def listen_host(config: KVTransportConfig, secret: bytes) -> str:
    if config.host == "auto":
        return "0.0.0.0" if secret else "127.0.0.1"
    if not secret and not is_loopback(config.host):
        raise ValueError(
            f"host {config.host!r} is reachable from other machines, so a shared secret is needed: "
            f"set secret, secret_file or ${SECRET_ENV} on every server (or host=127.0.0.1)"
        )
    return config.host


def _reachable_host(host: str) -> str:
    """The address to advertise for a wildcard: that of the interface with the default route."""
    if host not in ("0.0.0.0", "::"):
        return host
    family, probe = (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((probe, 9))  # a datagram socket sends nothing: this only looks up the route
            return str(sock.getsockname()[0])
        except OSError as error:
            raise ValueError(
                f"advertise_host is not set, and this machine has no default route that would tell it ({error}): set "
                "it to the address at which peers reach this machine, or host=127.0.0.1 for peers on this one"
            ) from error


def advertised_host(config: KVTransportConfig) -> str:
    """Where peers reach this node. Raises ValueError as ``listen_host``, and where nothing but an option could tell."""
    return config.advertise_host or _reachable_host(listen_host(config, config.resolved_secret()))


def listen_on(backend: Backend, host: str, config: KVTransportConfig, rank: int) -> str:
    """Let a backend of this rank listen on ``host``; returns what peers dial. Raises OSError as the backend does."""
    name = backend.capabilities.name
    if not backend.capabilities.crosses_nodes:
        return backend.listen(f"{name}://")
    port = config.port + rank if config.port else 0
    bound = backend.listen(f"{name}://{bracket(host)}:{port}").rpartition(":")[2]
    if config.advertise_port is not None:
        bound = str(config.advertise_port + rank)
    return f"{name}://{bracket(advertised_host(config))}:{bound}"
