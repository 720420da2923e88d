# SPDX-License-Identifier: Apache-2.0
"""What data and context parallelism of vLLM mean for a transport: ports of its own for each engine, or a refusal."""

from __future__ import annotations

from typing import Any

from sage_kv_connector.config import KVTransportConfig


def refuse_context_parallel(parallel_config: Any) -> None:
    """Raises ValueError for an engine whose ranks hold different tokens of one request."""
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        size = int(getattr(parallel_config, name, 1) or 1)
        if size > 1:
            raise ValueError(
                f"{name} is {size}; allowed: 1 (with more a rank holds some of a request's tokens, which sage_kvt "
                "can't hand over)"
            )


def data_parallel_rank(parallel_config: Any) -> int:
    """Of this engine, also where vLLM gives it a configuration as if it were alone (dense models)."""
    return int(getattr(parallel_config, "data_parallel_index", 0) or 0)


def own_ports(config: KVTransportConfig, parallel_config: Any) -> KVTransportConfig:
    """Options of this engine among its data parallel siblings: ports that are fixed count on from rank to rank.

    Rank r of data parallel rank d takes ``port + d * ranks + r`` of ``ranks`` ranks an engine; the same holds for
    ``advertise_port``, and the bootstrap server takes ``bootstrap_port + d``. Raises ValueError for a port that does
    not exist.
    """
    dp_rank = data_parallel_rank(parallel_config)
    if not dp_rank:
        return config
    ranks = int(parallel_config.tensor_parallel_size) * int(parallel_config.pipeline_parallel_size)
    steps = {"port": dp_rank * ranks, "advertise_port": dp_rank * ranks, "bootstrap_port": dp_rank}
    moved = {name: port + step for name, step in steps.items() if (port := getattr(config, name))}
    for name, port in moved.items():
        if port > 65535:
            raise ValueError(
                f"{name} is {getattr(config, name)}; with data parallel rank {dp_rank} that comes to {port}, "
                "allowed: at most 65535"
            )
    return config.model_copy(update=moved)
