# SPDX-License-Identifier: Apache-2.0
"""The order in which vLLM's CPU kernels pack a page."""

from __future__ import annotations

from typing import Any

from sage_kv_connector.integrations.vllm.specs import latent, recurrent


def packing(vllm_config: Any, spec: Any) -> str:
    """A tag of it, which depends on the machine's instruction set; "" for plain order, as latents have it."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or recurrent(spec) or latent(spec):
        return ""
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    except ImportError:
        return "cpu"
    known = (vllm_config.model_config.dtype, int(spec.block_size), int(spec.head_size))
    try:
        return f"cpu-{_get_attn_isa(*known, vllm_config.cache_config.cache_dtype)}"
    except TypeError:  # releases before the cache dtype was an argument
        return f"cpu-{_get_attn_isa(*known)}"
