# SPDX-License-Identifier: Apache-2.0
"""What vLLM's KV cache specs say: which groups move, and what a layer of one keeps.

A group's spec is one layer's, or (``UniformTypeKVCacheSpecs``) holds one for each of its layers. vLLM's scheduler gets
the first of these instead: it needs what they have in common, which is all that is asked of a whole group here.
"""

from __future__ import annotations

from typing import Any

from sage_kv_connector.contract.dtypes import dtype_of_engine


def transfer_groups(kv_cache_config: Any) -> list[tuple[int, Any]]:
    """(group id, group) of the kv groups that take part in transfers."""
    ids = getattr(kv_cache_config, "transfer_group_ids", None)
    groups = list(kv_cache_config.kv_cache_groups)
    return [(i, groups[i]) for i in (range(len(groups)) if ids is None else ids)]


def layer_spec(group: Any, layer: str) -> Any:
    """The spec of one layer of a group."""
    return getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(layer, group.kv_cache_spec)


def first_spec(spec: Any) -> Any:
    """Of a group's spec: that of its first layer."""
    inner = getattr(spec, "kv_cache_specs", None)
    return next(iter(inner.values())) if inner else spec


def recurrent(spec: Any) -> bool:
    """Whether a group's layers keep a state instead of every token's K and V."""
    return not hasattr(first_spec(spec), "num_kv_heads")


def latent(spec: Any) -> bool:
    """Whether a layer keeps one vector a token that K and V are made from (MLA), or one of an indexer."""
    named = any("MLA" in kind.__name__ for kind in type(spec).__mro__)
    return named or getattr(spec, "head_size_v", None) == 0


def channels(spec: Any) -> tuple[int, int]:
    """Of K (or a latent) and of V, for each head and token."""
    keys = int(spec.head_size)
    if latent(spec):
        return keys, 0
    values = getattr(spec, "head_size_v", None)
    return keys, keys if values is None else int(values)


def packed(spec: Any) -> bool:
    """Whether a page holds more or other than each token's K and V: scales, codes across bytes, compressed states."""
    own = getattr(spec, "state_content_bytes", None) is not None or getattr(spec, "num_head_slots", None)
    return bool(own) or getattr(spec, "tokens_per_state", 1) != 1


def sliding_window(spec: Any) -> int:
    """Tokens that a group's layers look back, 0 = all.

    Layers with a window in a group that keeps everything (``--disable-hybrid-kv-cache-manager``) share it with layers
    that look at everything.
    """
    first = first_spec(spec)
    if any(kind.__name__ == "FullAttentionSpec" for kind in type(first).__mro__):
        return 0
    return int(getattr(first, "sliding_window", None) or 0)


def first_in_window(tokens: int, window: int) -> int:
    """The first token that the one behind ``tokens`` looks at, itself being the window's last."""
    return max(0, tokens + 1 - window) if window else 0


def kind(spec: Any) -> str:
    """A layer's kind of attention, as peers compare it."""
    name = type(spec).__name__.removesuffix("Spec").lower()
    window = sliding_window(spec)
    return f"{name}:{window}" if window else name


def dtype_name(name: str) -> str:
    """Our name of what vLLM calls a dtype, its own where we have none."""
    ours = dtype_of_engine(name) or name.removeprefix("torch.")
    if ours == "fp8_e4m3" and _fp8_is_fnuz():
        return "fp8_e4m3fnuz"  # other codes for the same numbers
    return ours


def cache_dtype(vllm_config: Any) -> str:
    """The dtype of the whole cache."""
    name = str(vllm_config.cache_config.cache_dtype)
    return dtype_name(str(vllm_config.model_config.dtype) if name == "auto" else name)


def layer_dtype(spec: Any, whole: str) -> str:
    """Of a layer's elements, in a cache that is ``whole``; the dtypes of a recurrent layer's states, one by one."""
    if recurrent(spec):
        return " ".join(dtype_name(str(one)) for one in getattr(spec, "dtypes", ()))
    own = getattr(spec, "cache_dtype_str", None)
    if own not in (None, "auto"):
        return dtype_name(own)
    mode = getattr(spec, "kv_quant_mode", None)
    if mode is None or (int(mode) and not _plain(whole)):
        return whole
    return str(mode.name).lower() if int(mode) else dtype_name(str(spec.dtype))


def _plain(dtype: str) -> bool:
    return dtype in ("fp32", "fp16", "bf16")


def _fp8_is_fnuz() -> bool:
    """Whether fp8 is coded without a negative zero here, as on some AMD cards."""
    from vllm.platforms import current_platform

    return bool(getattr(current_platform, "is_fp8_fnuz", bool)())
