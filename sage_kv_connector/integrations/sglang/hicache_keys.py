# SPDX-License-Identifier: Apache-2.0
"""Keys of SGLang's pages in a store: two servers share a page if and only if its bytes mean the same to both.

SGLang names a page by a hash over its tokens and all before them. What else makes its bytes goes into a
digest that each key begins with: model, what this rank holds of it, and how the host pool lays it out.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

#: Attributes of host pools that say how a page's bytes are laid out; those that a pool lacks are left out.
_POOL_ATTRIBUTES = (
    "layout", "page_size", "dtype", "layer_num", "start_layer", "end_layer", "head_num", "head_dim", "v_head_dim",
    "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim", "size_per_token", "storage_format_tag",
)  # fmt: skip


def page_namespace(
    storage_config: Any, pool: Any, piece_sizes: tuple[int, ...], name: str, weights: str
) -> str:
    """The digest for pages of ``pool`` as ``HiCacheStorageConfig`` describes this rank; 32 hex digits.

    ``piece_sizes``: bytes of the pieces of one page, in the order in which they are stored. ``name`` is the
    user's own, which separates what SGLang can't tell apart. ``weights``: what the model's weights are; its name
    is the server's choice and says nothing. Ranks that hold replicas (MLA) share.
    ``dp_rank`` is left out: ranks of data parallel attention hold the same kind of pages.
    """
    of_rank = {
        field: getattr(storage_config, field, default)
        for field, default in (
            ("tp_rank", 0), ("tp_size", 1), ("pp_rank", 0), ("pp_size", 1), ("attn_cp_rank", 0),
            ("attn_cp_size", 1), ("dcp_rank", 0), ("dcp_size", 1),
        )
    }  # fmt: skip
    if storage_config.is_mla_model:
        del of_rank["tp_rank"], of_rank["tp_size"]
    described = {
        "weights": weights or storage_config.model_name,
        "name": name,
        "rank": of_rank,
        "pool": type(pool).__name__,
        "pieces": piece_sizes,
        **{key: str(getattr(pool, key)) for key in _POOL_ATTRIBUTES if hasattr(pool, key)},
    }
    text = json.dumps(described, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
