# SPDX-License-Identifier: Apache-2.0
"""KV cache transport between prefill and decode.

``import sage_kv_connector`` is cheap: it loads no torch, no inference engine
and not the data plane. Names below load their module at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sage_kv_connector.config import KVTransportConfig as KVTransportConfig
    from sage_kv_connector.contract.chunk import DeviceSpec as DeviceSpec
    from sage_kv_connector.contract.chunk import KVChunk as KVChunk
    from sage_kv_connector.contract.chunk import Segment as Segment
    from sage_kv_connector.contract.plan import TransferPlan as TransferPlan
    from sage_kv_connector.contract.schema import KVCacheSchema as KVCacheSchema
    from sage_kv_connector.engine.transport import TransportEngine as TransportEngine

_HOME = {
    "KVTransportConfig": "sage_kv_connector.config",
    "DeviceSpec": "sage_kv_connector.contract.chunk",
    "KVChunk": "sage_kv_connector.contract.chunk",
    "Segment": "sage_kv_connector.contract.chunk",
    "TransferPlan": "sage_kv_connector.contract.plan",
    "KVCacheSchema": "sage_kv_connector.contract.schema",
    "TransportEngine": "sage_kv_connector.engine.transport",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
