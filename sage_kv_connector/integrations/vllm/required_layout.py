# SPDX-License-Identifier: Apache-2.0
"""Which layout of the cache the connector asks vLLM for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def required_layout(vllm_config: Any) -> str | None:
    """Heads outside of tokens in each layer's block, by vLLM's name for it; None: whatever the backend prefers.

    Two servers with other attention backends have equal caches then, so that pages go as they are, and a tensor
    parallel slice of a page is one run. It is asked for on NVIDIA's cards alone, where backends have no preference
    or this one. Elsewhere it may cost a backend its own kernels (ROCm's want heads outside of blocks), a latent has
    one head, and a CPU's kernels know no other. vLLM takes what the user set, and what a backend can, before it.
    """
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    if not current_platform.is_cuda() or model is None or model.use_mla:
        return None
    return (
        "LBHNC" if find_spec("vllm.v1.kv_cache_layout") else "HND"
    )  # the same, in releases without that module
