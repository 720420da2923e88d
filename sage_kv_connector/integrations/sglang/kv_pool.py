# SPDX-License-Identifier: Apache-2.0
"""SGLang's KV pool as a KVCacheView, and the schema that describes it.

A pool keeps one buffer a layer and plane, ``(tokens, heads, channels)``, addressed by token
slots; page p is the slots from ``p * page_size``. ``KVArgs`` lists all K buffers, then all V
buffers; of latent (MLA) pools one buffer a layer. Layers get the names that vLLM gives them,
by which caches of different engines are matched.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from sage_kv_connector.contract.cache_view import KVCacheView, group_view, strided_planes
from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES, DTYPE_BITS, dtype_of_engine
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.integrations.common.rank_map import head_range

#: SGLang's own, for AMD's kernels: what it says of a pool ``KVArgs`` does not.
LAYOUT_ENV = "SGLANG_AITER_KV_CACHE_LAYOUT"


class PoolShape(NamedTuple):
    """What the pointers of KVArgs don't say. ``heads`` are those of this rank; a latent has one."""

    model: str
    dtype: str
    total_layers: int
    total_heads: int
    heads: int
    latent: bool
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    weights: str = ""


class _Buffer(NamedTuple):
    """One buffer of the pool; has of a tensor what ``plane_view`` reads."""

    address: int
    shape: tuple[int, ...]
    item: int

    def data_ptr(self) -> int:
        return self.address

    def element_size(self) -> int:
        return self.item

    def stride(self) -> tuple[int, ...]:
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.append(strides[-1] * size)
        return tuple(reversed(strides))


def cache_dtype(name: str, model_dtype: str) -> str:
    """The schema's name of a pool's dtype. Raises ValueError for one that can't be transferred."""
    given = model_dtype if name == "auto" else name
    ours = dtype_of_engine(str(given))
    if ours not in CONVERTIBLE_DTYPES:
        raise ValueError(
            f"kv_cache_dtype {given!r} can't be transferred; allowed: {', '.join(CONVERTIBLE_DTYPES)}"
        )
    return ours


def cache_view(kv_args: Any, shape: PoolShape) -> KVCacheView:
    """The pages of every layer. Raises ValueError naming the field of KVArgs that can't be used."""
    _refuse(kv_args)
    page_size = int(kv_args.page_size)
    planes = ("latent",) if shape.latent else ("k", "v")
    pointers = list(kv_args.kv_data_ptrs)
    if not pointers or len(pointers) % len(planes):
        raise ValueError(f"kv_data_ptrs has {len(pointers)} buffers, expected {len(planes)} for each layer")
    layers = len(pointers) // len(planes)
    buffers = [
        _buffer(address, length, item, page_size, shape)
        for address, length, item in zip(pointers, kv_args.kv_data_lens, kv_args.kv_item_lens, strict=True)
    ]
    axes = ("page", "token", "head", "dim")
    pages = buffers[0].shape[0]
    first = int(getattr(kv_args, "prefill_start_layer", 0) or 0) if shape.pp_size > 1 else 0
    named = [
        (
            f"model.layers.{first + layer}.self_attn.attn",
            [(plane, buffers[index * layers + layer], axes) for index, plane in enumerate(planes)],
        )
        for layer in range(layers)
    ]
    canonical = tuple(
        found
        for index, (plane, buffer, _) in enumerate(named[0][1])
        for found in strided_planes(plane, buffer, axes, index)
    )
    kind = "mlaattention" if shape.latent else "fullattention"
    group = group_view(kind, page_size, pages, named, heads=shape.heads, canonical=canonical)
    return KVCacheView((group,))


def cache_schema(view: KVCacheView, shape: PoolShape) -> KVCacheSchema:
    """Describe this rank's part of the cache."""
    import sglang

    heads = head_range(shape.tp_rank, shape.tp_size, shape.total_heads)
    return KVCacheSchema(
        engine=f"sglang {sglang.__version__}",
        model=shape.model,
        dtype=shape.dtype,
        total_layers=shape.total_layers,
        total_kv_heads=shape.total_heads,
        head_start=heads.start,
        head_count=shape.heads,
        head_dim=view.groups[0].canonical[0].dim,
        groups=tuple(group.schema() for group in view.groups),
        tp_rank=shape.tp_rank,
        tp_size=shape.tp_size,
        pp_rank=shape.pp_rank,
        pp_size=shape.pp_size,
        weights=shape.weights,
    )


def _buffer(address: int, length: int, item_len: int, page_size: int, shape: PoolShape) -> _Buffer:
    item = DTYPE_BITS[shape.dtype] // 8
    channels, rest = divmod(int(item_len), page_size * shape.heads * item)
    if rest or not channels:
        raise ValueError(
            f"kv_item_lens: {item_len} bytes a page are no multiple of {page_size} tokens x "
            f"{shape.heads} heads x {item} bytes ({shape.dtype})"
        )
    return _Buffer(int(address), (int(length) // int(item_len), page_size, shape.heads, channels), item)


def _refuse(kv_args: Any) -> None:
    """Pools whose content is more than pages of K and V, or a latent, in plain order."""
    if kv_args.state_types:
        names = ", ".join(str(getattr(kind, "value", kind)) for kind in kv_args.state_types)
        raise ValueError(f"state_types [{names}] can't be transferred by sage_kvt; allowed: none")
    groups = int(getattr(kv_args, "kv_buf_groups", 1) or 1)
    if groups != 1:  # a latent in parts, which Ascend's pools may also keep in tiles
        raise ValueError(f"kv_buf_groups {groups} can't be transferred by sage_kvt; allowed: 1")
    layout = os.environ.get(LAYOUT_ENV, "nhd").lower()
    if layout != "nhd":
        raise ValueError(f"${LAYOUT_ENV} {layout!r} can't be transferred by sage_kvt; allowed: nhd")
    for name in ("kv_layout", "kv_layer_ids", "num_draft_entries"):
        if value := getattr(kv_args, name, None):
            raise ValueError(f"{name} {value!r} can't be transferred by sage_kvt; allowed: none")
