# SPDX-License-Identifier: Apache-2.0
"""How vLLM's own connectors are run for comparison: arguments, environment, and what a request carries."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PLUGINS = Path(__file__).resolve().parent / "plugins"


@dataclass(frozen=True)
class ServerSide:
    """What one server of a pair is started with."""

    kv_transfer_config: str | dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PeerPair:
    """A prefill and a decode server. ``bootstrap_port``: requests go to both as Mooncake's router sends them."""

    prefill: ServerSide
    decode: ServerSide
    bootstrap_port: int | None = None


def nixl(transport: str, side_channel_ports: tuple[int, int], connector: str = "NixlConnector") -> PeerPair:
    """NIXL's pull or push connector; ``transport`` is cma (UCX's own choice on one node) or tcp."""
    tls = {"cma": "posix,cma,tcp,self", "tcp": "tcp,self"}[transport]
    config = {"kv_connector": connector, "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    sides = [
        ServerSide(config, {"UCX_TLS": tls, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)})
        for port in side_channel_ports
    ]
    return PeerPair(sides[0], sides[1])


def mooncake(bootstrap_port: int) -> PeerPair:
    """MooncakeConnector over tcp, made to start on a CPU."""
    common = {"kv_connector": "MooncakeConnector", "kv_connector_extra_config": {"mooncake_protocol": "tcp"}}
    env = {"SAGE_KVT_MOONCAKE_ON_CPU": "1", "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(bootstrap_port)}
    return PeerPair(
        ServerSide(common | {"kv_role": "kv_producer"}, env),
        ServerSide(common | {"kv_role": "kv_consumer"}, env),
        bootstrap_port,
    )


def bootstrap_params(bootstrap_port: int, transfer_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``kv_transfer_params`` of the prefill and of the decode request, as vLLM's router makes them."""
    address = f"http://127.0.0.1:{bootstrap_port}"
    with urllib.request.urlopen(f"{address}/query", timeout=10) as response:
        engine_id = json.load(response)["0"]["engine_id"]
    prefill = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    decode = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_bootstrap_addr": address,
        "remote_engine_id": engine_id,
    }
    return prefill, decode
