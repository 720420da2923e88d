# SPDX-License-Identifier: Apache-2.0
"""A rank of an engine as others get to know it: how it is reached, and what its KV cache is."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from sage_kv_connector.contract.failure import printable
from sage_kv_connector.contract.schema import KVCacheSchema


class PeerAddress(NamedTuple):
    """One rank of a peer engine and the addresses that reach it, the best first."""

    engine_id: str
    rank: int
    addresses: tuple[str, ...]

    @property
    def label(self) -> str:
        return rank_label(self.engine_id, self.rank)


def rank_label(engine_id: str, rank: int) -> str:
    """A rank of an engine in log lines."""
    return f"{printable(engine_id)}[{rank}]"


class RegisteredKV(NamedTuple):
    """A rank's KV cache, as it is known to the transport. ``node`` and ``addresses`` as in DeviceSpec."""

    engine_id: str
    rank: int
    schema: KVCacheSchema
    addresses: tuple[str, ...]
    node: str


def bracket(host: str) -> str:
    """A host as addresses and URLs name it: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host without a port, IPv6 with or without brackets; no name is looked up."""
    name = host.removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
