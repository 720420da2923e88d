# SPDX-License-Identifier: Apache-2.0
"""The schema that describes a worker's caches to its peers."""

from __future__ import annotations

from typing import Any

from sage_kv_connector.contract.cache_view import KVCacheView
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.integrations.common.weight_files import weights_identity
from sage_kv_connector.integrations.vllm.kv_caches import attention_heads
from sage_kv_connector.integrations.vllm.packing import packing
from sage_kv_connector.integrations.vllm.specs import cache_dtype, first_spec, transfer_groups


def cache_schema(
    view: KVCacheView, vllm_config: Any, kv_cache_config: Any, tp_rank: int, pp_rank: int, weights: str
) -> KVCacheSchema:
    """Describe this worker's part of the cache."""
    import vllm

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    first = first_spec(transfer_groups(kv_cache_config)[0][1].kv_cache_spec)
    latent = any(plane.schema.name == "latent" for group in view.groups for plane in group.layers[0].planes)
    total = 1 if latent else int(model.get_total_num_kv_heads())
    size = int(parallel.tensor_parallel_size)
    return KVCacheSchema(
        engine=f"vllm {vllm.__version__}",
        model=str(model.model),
        dtype=cache_dtype(vllm_config),
        total_layers=int(model.get_total_num_hidden_layers()),
        total_kv_heads=total,
        head_start=first_head(tp_rank, size, total),
        head_count=attention_heads(kv_cache_config) or 1,
        head_dim=int(getattr(first, "head_size", 0)),
        groups=tuple(group.schema() for group in view.groups),
        packing=packing(vllm_config, first),
        tp_rank=tp_rank,
        tp_size=size,
        pp_rank=pp_rank,
        pp_size=int(parallel.pipeline_parallel_size),
        weights=weights,
    )


#: What vLLM calls weights that were never given another version.
FIRST_VERSION = "default"


def weights_of(vllm_config: Any, version: str = FIRST_VERSION) -> str:
    """What the model's weights are; reads a little of each file. ``version``: of weights replaced while it runs."""
    model, load = vllm_config.model_config, vllm_config.load_config
    return weights_identity(
        str(getattr(model, "model_weights", None) or model.model),
        str(getattr(model, "revision", None) or ""),
        str(getattr(model, "quantization", None) or ""),
        getattr(model, "hf_overrides", None),
        str(getattr(load, "load_format", "auto")),
        "" if version == FIRST_VERSION else version,
    )


def first_head(tp_rank: int, tp_size: int, total_heads: int) -> int:
    """First kv head of a tensor parallel rank; with fewer heads than ranks, neighbours hold the same one."""
    return tp_rank * total_heads // tp_size
