# SPDX-License-Identifier: Apache-2.0
"""A rank's KV cache as others get to know it."""

from __future__ import annotations

from typing import NamedTuple

from sage_kv_connector.contract.schema import KVCacheSchema


class RegisteredKV(NamedTuple):
    """A rank's KV cache, as it is known to the transport. ``node`` and ``addresses`` as in DeviceSpec."""

    engine_id: str
    rank: int
    schema: KVCacheSchema
    addresses: tuple[str, ...]
    node: str
