# SPDX-License-Identifier: Apache-2.0
"""Which backends to enable, and which address of a peer to try first."""

from __future__ import annotations

import os
from collections.abc import Iterable

from sage_kv_connector.backends import BACKENDS, backend_class
from sage_kv_connector.config import KVTransportConfig
from sage_kv_connector.contract.node import node_id

#: Backends that move device memory itself; a host cache has no use for them.
DEVICE_BACKENDS = ("pcie",)


def enabled_backends(config: KVTransportConfig, *, on_device: bool = False) -> tuple[str, ...]:
    """Names of the backends to start, the preferred first.

    ``pcie`` brings shm and tcp along: pages for a peer that it can't reach directly are staged in
    host memory. Raises ValueError for ``pcie`` with a cache in host memory.
    """
    direct = on_device and config.zero_copy
    if config.backend == "pcie" and not on_device:
        raise ValueError("backend is 'pcie', which needs a KV cache on a device; this one is in host memory")
    if config.backend in ("auto", "pcie"):
        return tuple(name for name in BACKENDS if direct or name not in DEVICE_BACKENDS)
    return (config.backend,)


def order_addresses(addresses: Iterable[str], peer_node: str, enabled: tuple[str, ...]) -> tuple[str, ...]:
    """A peer's addresses that can work from here, the best first; some only within one node."""
    same_node = peer_node != "" and peer_node == node_id()
    usable = [a for a in addresses if a.partition("://")[0] in enabled]
    usable = [
        a for a in usable if same_node or not backend_class(a.partition("://")[0]).capabilities.same_node_only
    ]
    return tuple(sorted(usable, key=lambda address: enabled.index(address.partition("://")[0])))


def default_lanes() -> int:
    """Data-plane threads of a backend: one, and a second where the engine leaves cores over."""
    return 2 if len(os.sched_getaffinity(0)) > 2 else 1
