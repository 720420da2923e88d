# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache tensors as a KVCacheView, and the schema that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage_kv_connector.contract.cache_view import (
    CanonicalPlane,
    GroupView,
    KVCacheView,
    group_view,
    strided_planes,
)
from sage_kv_connector.contract.dtypes import dtype_of_engine
from sage_kv_connector.contract.element_order import packed_cpu_planes
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.integrations.common.weight_files import weights_identity


def transfer_groups(kv_cache_config: Any) -> list[tuple[int, Any]]:
    """(group id, group) of the kv groups that take part in transfers."""
    ids = getattr(kv_cache_config, "transfer_group_ids", None)
    groups = list(kv_cache_config.kv_cache_groups)
    return [(i, groups[i]) for i in (range(len(groups)) if ids is None else ids)]


def cache_view(kv_caches: dict[str, Any], vllm_config: Any, kv_cache_config: Any) -> KVCacheView:
    """The pages of every transferable group.

    Raises ValueError naming the layer for a tensor whose page axis can't be found.
    """
    pages = int(kv_cache_config.num_blocks)
    attention = getattr(vllm_config.compilation_config, "static_forward_context", {})
    groups: list[GroupView] = []
    for _, group in transfer_groups(kv_cache_config):
        spec = group.kv_cache_spec
        layers = []
        for name in group.layer_names:
            if name not in kv_caches:
                continue  # a layer that shares another layer's cache
            layer_spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)
            layers.append((name, _planes(name, kv_caches[name], layer_spec, pages)))
        canonical = _canonical(layers[0][1], spec, pages, _packing(vllm_config, spec)) if layers else ()
        scales: tuple[tuple[float, ...], ...] = ()
        if canonical and _dtype(vllm_config).startswith("fp8"):
            scales = tuple(_scales(attention.get(name), len(canonical)) for name, _ in layers)
        groups.append(
            group_view(
                _kind(spec),
                int(spec.block_size),
                pages,
                layers,
                heads=int(getattr(spec, "num_kv_heads", 0)),
                canonical=canonical,
                scales=scales,
            )
        )
    return KVCacheView(tuple(groups))


def _canonical(
    planes: list[tuple[str, Any, Sequence[str]]], spec: Any, pages: int, packing: str
) -> tuple[CanonicalPlane, ...]:
    """Where K and V (or a latent) lie in a page; empty where that can't be told."""
    if recurrent(spec):
        return ()
    dim, size = int(spec.head_size), int(spec.block_size)
    if packing and planes[0][0] != "latent":  # vLLM's CPU kernels keep latents in plain order
        name, tensor, _ = planes[0]
        shape = (pages, int(spec.num_kv_heads), size, 2 * dim)
        if len(planes) != 1 or name != "kv" or tuple(tensor.shape) != shape or not tensor[0].is_contiguous():
            return ()
        orders = packed_cpu_planes(packing, int(tensor.element_size()), size, dim)
        if orders is None:
            return ()
        return (CanonicalPlane("k", dim, 0, orders[0]), CanonicalPlane("v", dim, 0, orders[1]))
    found: list[CanonicalPlane] = []
    for index, (name, tensor, axes) in enumerate(planes):
        if tensor.shape[list(axes).index("page")] != pages:
            return ()  # the engine's kernels use smaller pages than its block table
        found += strided_planes(name, tensor, axes, index)
    return tuple(found)


def _scales(layer: Any, planes: int) -> tuple[float, ...]:
    """vLLM's per-tensor scales of an fp8 cache: K's, then V's."""
    names = ("_k_scale_float", "_v_scale_float")[:planes]
    return tuple(float(getattr(layer, name, 1.0)) for name in names)


def cache_schema(
    view: KVCacheView, vllm_config: Any, kv_cache_config: Any, tp_rank: int, pp_rank: int, weights: str
) -> KVCacheSchema:
    """Describe this worker's part of the cache."""
    import vllm

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    first = transfer_groups(kv_cache_config)[0][1].kv_cache_spec
    heads = int(getattr(first, "num_kv_heads", 1))
    latent = any(plane.name == "latent" for group in view.groups for plane in group.canonical)
    total = 1 if latent else int(model.get_total_num_kv_heads())
    size = int(parallel.tensor_parallel_size)
    return KVCacheSchema(
        engine=f"vllm {vllm.__version__}",
        model=str(model.model),
        dtype=_dtype(vllm_config),
        total_layers=int(model.get_total_num_hidden_layers()),
        total_kv_heads=total,
        head_start=first_head(tp_rank, size, total),
        head_count=heads,
        head_dim=int(getattr(first, "head_size", 0)),
        groups=tuple(group.schema() for group in view.groups),
        packing=_packing(vllm_config, first),
        tp_rank=tp_rank,
        tp_size=size,
        pp_rank=pp_rank,
        pp_size=int(parallel.pipeline_parallel_size),
        weights=weights,
    )


def weights_of(vllm_config: Any) -> str:
    """What the model's weights are; reads a little of each file."""
    model, load = vllm_config.model_config, vllm_config.load_config
    return weights_identity(
        str(getattr(model, "model_weights", None) or model.model),
        str(getattr(model, "revision", None) or ""),
        str(getattr(model, "quantization", None) or ""),
        getattr(model, "hf_overrides", None),
        str(getattr(load, "load_format", "auto")),
    )


def first_head(tp_rank: int, tp_size: int, total_heads: int) -> int:
    """First kv head of a tensor parallel rank; with fewer heads than ranks, neighbours hold the same one."""
    return tp_rank * total_heads // tp_size


def sliding_window(spec: Any) -> int:
    """Tokens that a group's layers look back, 0 = all."""
    return int(getattr(spec, "sliding_window", None) or 0)


def first_in_window(tokens: int, window: int) -> int:
    """The first token that the one behind ``tokens`` looks at, itself being the window's last."""
    return max(0, tokens + 1 - window) if window else 0


def _kind(spec: Any) -> str:
    name = type(spec).__name__.removesuffix("Spec").lower()
    window = sliding_window(spec)
    return f"{name}:{window}" if window else name


def _dtype(vllm_config: Any) -> str:
    name = str(vllm_config.cache_config.cache_dtype)
    if name == "auto":
        name = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return dtype_of_engine(name) or name


def _planes(layer: str, cache: Any, spec: Any, pages: int) -> list[tuple[str, Any, Sequence[str]]]:
    """One tensor, or a tuple or list of them (K and V, recurrent states)."""
    if isinstance(cache, tuple | list):
        names = ("k", "v") if len(cache) == 2 and not recurrent(spec) else None
        return [
            (names[i] if names else f"state{i}", tensor, _axes(layer, tensor, spec, pages))
            for i, tensor in enumerate(cache)
        ]
    name = "latent" if cache.dim() == 3 and not recurrent(spec) else "kv"
    return [(name, cache, _axes(layer, cache, spec, pages))]


def recurrent(spec: Any) -> bool:
    """Whether a group's layers keep a state instead of every token's K and V."""
    return not hasattr(spec, "num_kv_heads")


def _axes(layer: str, tensor: Any, spec: Any, pages: int) -> Sequence[str]:
    """Name a tensor's axes by their sizes.

    The page axis is the first that holds all pages; where K and V are split inside
    one tensor the axis of size 2 beside it is the plane.
    """
    shape = tuple(int(n) for n in tensor.shape)
    page_axis = next(
        (
            i
            for i, n in enumerate(shape[:2])
            if n >= pages and n % pages == 0 and (i == 1 or shape[0] != 2 or pages == 2)
        ),
        None,
    )
    if page_axis is None:
        raise ValueError(f"KV cache of layer {layer!r}: shape {shape} has no axis for its {pages} blocks")
    kernel_block = int(spec.block_size) * pages // shape[page_axis]
    heads, dim = int(getattr(spec, "num_kv_heads", 0)), int(getattr(spec, "head_size", 0))
    names: list[str] = []
    for i, size in enumerate(shape):
        left = [n for n in ("head", "token") if n not in names]
        if i == page_axis:
            names.append("page")
        elif size == 2 and len(shape) == 5 and "plane" not in names and i <= 1:
            names.append("plane")
        elif i == len(shape) - 1:
            names.append("content" if size != dim else "dim")
        elif left == ["head", "token"] and size == heads and (size != kernel_block or len(shape) == 4):
            names.append("head")
        elif "token" in left and size == kernel_block:
            names.append("token")
        elif "head" in left and size == heads:
            names.append("head")
        else:
            names.append(f"axis{i}")
    return names


def _packing(vllm_config: Any, spec: Any) -> str:
    """The order in which vLLM's CPU kernels pack a page; it depends on the machine's instruction set."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or recurrent(spec):
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
