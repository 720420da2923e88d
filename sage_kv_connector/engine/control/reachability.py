# SPDX-License-Identifier: Apache-2.0
"""Which backends to enable with which options, and which address of a peer to try first."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache

from sage_kv_connector.backends import (
    auto_backends,
    backend_class,
    backend_names,
    lacks,
    ranked_backends,
    unsuited,
)
from sage_kv_connector.backends.base import Backend, BackendOptions, Capabilities
from sage_kv_connector.backends.protecting_backend import ProtectingBackend
from sage_kv_connector.config import KVTransportConfig, Security
from sage_kv_connector.contract.node import node_id
from sage_kv_connector.engine.control.listen_address import advertised_host, link_addresses

logger = logging.getLogger(__name__)


def backend_options(config: KVTransportConfig) -> BackendOptions:
    """What the user's options say to a backend."""
    anywhere = config.host in ("auto", "0.0.0.0", "::")
    return BackendOptions(
        lanes=config.overlap_streams,
        chunk_bytes=config.chunk_size,
        direct=config.zero_copy,
        local_address="" if anywhere else config.host,
        reached_at=_reached_at(config),
        links=link_addresses(config),
        measures=config.telemetry,
        library_transport=config.library_transport,
        library_device=config.library_device,
    )


def _reached_at(config: KVTransportConfig) -> str:
    try:
        return advertised_host(config)
    except ValueError:  # who listens says so
        return ""


def enabled_backends(config: KVTransportConfig, *, on_device: bool = False) -> tuple[str, ...]:
    """Names of the backends to start, the preferred first.

    One that moves device memory brings the others along: pages for a peer that it can't reach directly are
    staged in host memory. Raises ValueError for such a one with a cache in host memory.
    """
    chosen = config.backend
    moves_devices = chosen != "auto" and backend_class(chosen).capabilities.device_memory
    if moves_devices and not on_device:
        raise ValueError(
            f"backend is {chosen!r}, which needs a KV cache on a device; this one is in host memory"
        )
    if chosen != "auto" and (why := lacks(chosen)):
        usable = ", ".join(("auto", *ranked_backends()))
        raise ValueError(f"backend is {chosen!r}, which can't be used here: {why}; allowed: {usable}")
    if chosen != "auto" and not moves_devices:
        return (chosen,)
    direct = on_device and config.zero_copy
    found = tuple(
        name for name in auto_backends() if direct or not backend_class(name).capabilities.device_memory
    )
    _say(found)
    return found


@cache
def _say(chosen: tuple[str, ...]) -> None:
    """Once a process: what ``auto`` may take, and why nothing else."""
    left_out = "; ".join(f"{name}: {_why_not(name)}" for name in backend_names() if name not in chosen)
    logger.info("backend auto takes the first of %s that reaches a peer (%s)", ", ".join(chosen), left_out)


def _why_not(name: str) -> str:
    try:
        return unsuited(name) or lacks(name) or "no KV cache on a device"
    except ValueError as error:  # a third party's that can't be loaded
        return str(error)


def check_protection(security: Security, backends: Iterable[Backend]) -> None:
    """Raises ValueError naming the backend that crosses nodes and can't protect what it carries, and why not."""
    for backend in backends:
        capabilities = backend.capabilities
        if security == "none" or not capabilities.crosses_nodes:
            continue
        why = (
            backend.protection_lacks()
            if isinstance(backend, ProtectingBackend) and capabilities.protects
            else "it has no way to protect what it carries"
        )
        if why:
            raise ValueError(
                f"security is {security!r}, which {capabilities.name} can't keep here: {why}; allowed: none, or "
                "another backend"
            )


def order_addresses(addresses: Iterable[str], peer_node: str, enabled: tuple[str, ...]) -> tuple[str, ...]:
    """A peer's addresses that can work from here, the best first; some only within one node."""
    same_node = peer_node != "" and peer_node == node_id()
    usable = [a for a in addresses if scheme_of(a) in enabled]
    usable = [a for a in usable if same_node or capabilities_of(a).crosses_nodes]
    return tuple(sorted(usable, key=lambda address: enabled.index(scheme_of(address))))


def scheme_of(address: str) -> str:
    """The backend that an address belongs to."""
    return address.partition("://")[0]


def capabilities_of(address: str) -> Capabilities:
    """Of the backend that an address belongs to. Raises ValueError as ``backend_class``."""
    return backend_class(scheme_of(address)).capabilities
