# SPDX-License-Identifier: Apache-2.0
"""Options of the HiCache backend, as they stand in ``--hicache-storage-backend-extra-config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sage_kv_connector.config import LONGEST_S, SECRET_ENV, SECRET_FIELDS, KVTransportConfig
from sage_kv_connector.integrations.sglang.options import hicache_transport

#: SGLang's own keys in the same object.
_SGLANG = ("backend_name", "module_path", "class_name", "interface_v1", "allocator", "file_storage_path")
_OURS = ("address", "deadline_s", "namespace", "transport")
DEADLINE_S = 5.0


class HiCacheOptions(NamedTuple):
    """``addresses`` of the store, ``deadline_s`` of each call, and what else separates this user's keys."""

    addresses: tuple[str, ...]
    deadline_s: float
    namespace: str
    transport: KVTransportConfig

    @classmethod
    def load(cls, extra: Mapping[str, Any] | None) -> HiCacheOptions:
        """Raises ValueError naming the option, its value and what is allowed."""
        extra = extra or {}
        unknown = sorted(set(extra) - {*_SGLANG, *_OURS})
        if unknown:
            raise ValueError(f"extra config has {', '.join(unknown)}; allowed: {', '.join(_OURS + _SGLANG)}")
        address = extra.get("address")
        addresses = (address,) if isinstance(address, str) else tuple(address or ())
        if not addresses or not all(isinstance(one, str) for one in addresses):
            raise ValueError(
                f"address is {address!r}; must be what `sage-kvt store` printed, such as tcp://HOST:PORT, or a list"
            )
        deadline_s = extra.get("deadline_s", DEADLINE_S)
        number = isinstance(deadline_s, int | float) and not isinstance(deadline_s, bool)
        if not number or not 0 < deadline_s <= LONGEST_S:
            raise ValueError(
                f"deadline_s is {deadline_s!r}, must be a number of seconds, more than 0 and at most {LONGEST_S}"
            )
        namespace = extra.get("namespace", "")
        if not isinstance(namespace, str):
            raise ValueError(f"namespace is {namespace!r}, must be text")
        transport = extra.get("transport")
        if transport is not None and not isinstance(transport, Mapping):
            raise ValueError(f"transport is {transport!r}, must be an object of the transport's options")
        if SECRET_FIELDS & set(transport or {}):
            raise ValueError(
                "transport.secret stands in SGLang's log by now: take another secret, and name a secret_file or set $"
                + SECRET_ENV
            )
        return cls(addresses, float(deadline_s), namespace, hicache_transport(transport))
