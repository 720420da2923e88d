# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV cache tensors as a KVCacheView.

A group of vLLM's is one block table. Layers of one table may keep different things (an indexer beside latents, other
head counts by layer, layers that are not quantized): those that keep the same are one group of ours, in the order of
each group's first layer, so that two servers with the same layers come to the same groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sage_kv_connector.contract.cache_view import (
    CanonicalPlane,
    GroupView,
    KVCacheView,
    group_view,
    plane_view,
    strided_planes,
)
from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES, DTYPE_BITS
from sage_kv_connector.contract.element_order import packed_cpu_planes
from sage_kv_connector.integrations.vllm.packing import packing
from sage_kv_connector.integrations.vllm.specs import (
    cache_dtype,
    channels,
    first_spec,
    kind,
    latent,
    layer_dtype,
    layer_spec,
    packed,
    recurrent,
    transfer_groups,
)

#: Name, tensor and axes of each plane of a layer.
_Planes = list[tuple[str, Any, Sequence[str]]]


class VllmCaches(NamedTuple):
    """``tables``: by group of ``view``, the block table that it follows, by its place among ``transfer_groups``."""

    view: KVCacheView
    tables: tuple[int, ...]


class _Layer(NamedTuple):
    name: str
    spec: Any
    planes: _Planes


def vllm_caches(kv_caches: dict[str, Any], vllm_config: Any, kv_cache_config: Any) -> VllmCaches:
    """The pages of every transferable group.

    Raises ValueError naming the layer for a tensor whose page axis can't be found.
    """
    pages, whole = int(kv_cache_config.num_blocks), cache_dtype(vllm_config)
    heads = attention_heads(kv_cache_config)
    views: list[GroupView] = []
    tables: list[int] = []
    for table, (_, group) in enumerate(transfer_groups(kv_cache_config)):
        alike: dict[object, list[_Layer]] = {}
        for name in group.layer_names:
            if name not in kv_caches:
                continue  # a layer that shares another layer's cache
            spec = layer_spec(group, name)
            planes = _planes(name, kv_caches[name], spec, pages)
            seen = tuple(plane_view(*plane, pages).schema for plane in planes)
            keeps = (kind(spec), layer_dtype(spec, whole), getattr(spec, "num_kv_heads", 0), seen)
            alike.setdefault(keeps, []).append(_Layer(name, spec, planes))
        for layers in alike.values():
            views.append(_group(layers, vllm_config, pages, whole, heads))
            tables.append(table)
    return VllmCaches(KVCacheView(tuple(views)), tuple(tables))


def attention_heads(kv_cache_config: Any) -> int:
    """KV heads of the first layer with attention; 0 where there is none. Groups with others only go as they are."""
    specs = [first_spec(group.kv_cache_spec) for _, group in transfer_groups(kv_cache_config)]
    return next((int(spec.num_kv_heads) for spec in specs if not recurrent(spec)), 0)


def _group(layers: list[_Layer], vllm_config: Any, pages: int, whole: str, heads: int) -> GroupView:
    spec, dtype = layers[0].spec, layer_dtype(layers[0].spec, whole)
    canonical: tuple[CanonicalPlane, ...] = ()
    if dtype == whole and int(getattr(spec, "num_kv_heads", 0)) == heads:
        canonical = _canonical(layers, dtype, pages, packing(vllm_config, spec))
    scales: tuple[tuple[float, ...], ...] = ()
    if canonical and whole.startswith("fp8"):
        attention = getattr(vllm_config.compilation_config, "static_forward_context", {})
        scales = tuple(_scales(attention.get(layer.name), len(canonical)) for layer in layers)
    return group_view(
        kind(spec),
        int(spec.block_size),
        pages,
        [(layer.name, layer.planes) for layer in layers],
        heads=int(getattr(spec, "num_kv_heads", 0)),
        canonical=canonical,
        scales=scales,
        dtype="" if dtype == whole else dtype,
    )


def _canonical(layers: list[_Layer], dtype: str, pages: int, packing: str) -> tuple[CanonicalPlane, ...]:
    """Where K and V (or a latent) lie in a page of any of the layers; empty where that can't be told."""
    spec, planes = layers[0].spec, layers[0].planes
    if recurrent(spec) or packed(spec) or dtype not in CONVERTIBLE_DTYPES:
        return ()
    if any(8 * int(tensor.element_size()) != DTYPE_BITS[dtype] for _, tensor, _ in planes):
        return ()
    if packing:
        return _packed_planes(spec, planes, pages, packing)
    found = _plain_planes(layers[0], pages)
    alike = all(_plain_planes(layer, pages) == found for layer in layers) and _one_stride(layers)
    return found if alike else ()


def _packed_planes(spec: Any, planes: _Planes, pages: int, packing: str) -> tuple[CanonicalPlane, ...]:
    dim, size = int(spec.head_size), int(spec.block_size)
    name, tensor, _ = planes[0]
    shape = (pages, int(spec.num_kv_heads), size, 2 * dim)
    if len(planes) != 1 or name != "kv" or channels(spec) != (dim, dim):
        return ()
    if tuple(tensor.shape) != shape or not tensor[0].is_contiguous():
        return ()
    orders = packed_cpu_planes(packing, int(tensor.element_size()), size, dim)
    if orders is None:
        return ()
    return (CanonicalPlane("k", dim, 0, orders[0]), CanonicalPlane("v", dim, 0, orders[1]))


def _plain_planes(layer: _Layer, pages: int) -> tuple[CanonicalPlane, ...]:
    found: list[CanonicalPlane] = []
    for index, (name, tensor, axes) in enumerate(layer.planes):
        planes = strided_planes(name, tensor, axes, index, channels(layer.spec))
        page_axis = list(axes).index("page")
        if planes and tensor.shape[page_axis] != pages:  # blocks of the engine's kernels, several a page
            tokens, block = int(tensor.shape[list(axes).index("token")]), tensor.stride(page_axis)
            tiles = (tokens, planes[0].order.token[1], int(block) * int(tensor.element_size()))
            planes = tuple(plane._replace(order=plane.order._replace(token=tiles)) for plane in planes)
        found += planes
    keys, values = channels(layer.spec)
    dims = {"k": keys, "v": values, "latent": keys}
    complete = {plane.name for plane in found} in ({"k", "v"}, {"latent"})
    return tuple(found) if complete and all(plane.dim == dims[plane.name] for plane in found) else ()


def _one_stride(layers: list[_Layer]) -> bool:
    """Whether pages of each plane are equally far from each other in all layers."""
    strides = {
        tuple(tensor.stride(list(axes).index("page")) for _, tensor, axes in one.planes) for one in layers
    }
    return len(strides) == 1


def _scales(layer: Any, planes: int) -> tuple[float, ...]:
    """vLLM's per-tensor scales of an fp8 cache: K's, then V's."""
    names = ("_k_scale_float", "_v_scale_float")[:planes]
    return tuple(float(getattr(layer, name, 1.0)) for name in names)


def _planes(layer: str, cache: Any, spec: Any, pages: int) -> _Planes:
    """One tensor, or a tuple or list of them (K and V, recurrent states)."""
    if isinstance(cache, tuple | list):
        names = ("k", "v") if len(cache) == 2 and not recurrent(spec) else None
        return [
            (names[i] if names else f"state{i}", tensor, _axes(layer, tensor, spec, pages))
            for i, tensor in enumerate(cache)
        ]
    name = "latent" if not recurrent(spec) and (latent(spec) or cache.dim() == 3) else "kv"
    return [(name, cache, _axes(layer, cache, spec, pages))]


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
