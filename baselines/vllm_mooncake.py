# SPDX-License-Identifier: Apache-2.0
"""vLLM's MooncakeConnector over tcp, with Mooncake's transfer engine.

As released it ends at its start without an accelerator, whose index it asks for; a plugin of ours answers that
(``plugins/``). Its wheel wants libraries of the system for RDMA, also for tcp. It takes its own address from
VLLM_HOST_IP. Batches of 4,096 descriptors are refused; its tcp lane fails some requests of 32,768 tokens.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from baselines.sides import LOOPBACK, Addresses, PeerPair, ServerSide, version_of


def version() -> str:
    return version_of("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")


def mooncake(bootstrap_port: int, addresses: Addresses | None = None) -> PeerPair:
    between = addresses or Addresses()
    common = {"kv_connector": "MooncakeConnector", "kv_connector_extra_config": {"mooncake_protocol": "tcp"}}
    env = {"SAGE_KVT_MOONCAKE_ON_CPU": "1", "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(bootstrap_port)}
    return PeerPair(
        ServerSide(common | {"kv_role": "kv_producer"}, env | _host(between.prefill)),
        ServerSide(common | {"kv_role": "kv_consumer"}, env | _host(between.decode)),
        bootstrap_port,
    )


def _host(address: str) -> dict[str, str]:
    return {} if address == LOOPBACK else {"VLLM_HOST_IP": address}


def bootstrap_params(
    bootstrap_port: int, transfer_id: str, host: str = LOOPBACK
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``kv_transfer_params`` of the prefill and of the decode request, as vLLM's router makes them."""
    address = f"http://{host}:{bootstrap_port}"
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
