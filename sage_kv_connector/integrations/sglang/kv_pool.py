# SPDX-License-Identifier: Apache-2.0
"""SGLang's KV pool as a KVCacheView, and the schema that describes it.

A pool keeps one buffer a layer and plane, ``(tokens, heads, channels)``, addressed by token
slots; page p is the slots from ``p * page_size``. ``KVArgs`` lists all K buffers, then all V
buffers; of latent (MLA) pools one buffer a layer, on Ascend all latents, then all their parts with
positions. A hybrid pool is two pools, the other one for layers with a sliding window. Layers get the
names that vLLM gives them, by which caches of different engines are matched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from sage_kv_connector.contract.cache_view import GroupView, KVCacheView, group_view, strided_planes
from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES, DTYPE_BITS, dtype_of_engine
from sage_kv_connector.contract.schema import KVCacheSchema
from sage_kv_connector.integrations.common.rank_map import head_range
from sage_kv_connector.integrations.sglang.sliding_windows import (
    ONE_POOL,
    STATE_TYPE,
    WindowLayers,
    state_names,
)

#: SGLang's own, for AMD's kernels: what it says of a pool ``KVArgs`` does not.
LAYOUT_ENV = "SGLANG_AITER_KV_CACHE_LAYOUT"
#: The same on Ascend: a latent in two parts lies in tiles of ``TILE`` channels of all tokens of a page.
TILES_ENV = "SGLANG_USE_FIA_NZ"
TILE = 16
#: Of ``KVArgs.kv_buf_groups``: a latent in one part, or in two.
LATENT_PARTS = (("latent",), ("latent", "rope"))


class PoolShape(NamedTuple):
    """What the pointers of KVArgs don't say. ``heads`` are those of this rank; a latent has one.

    ``windows``: of a hybrid pool.
    """

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
    windows: WindowLayers | None = None


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
    """The pages of every layer; of a hybrid pool the windows' layers are ``WINDOW_GROUP``.

    Raises ValueError naming the field of KVArgs that can't be used.
    """
    _refuse(kv_args, shape)
    buffers = _Buffers("kv", kv_args.kv_data_ptrs, kv_args.kv_data_lens, kv_args.kv_item_lens)
    kind = "mlaattention" if shape.latent else "fullattention"
    page_size = int(kv_args.page_size)
    planes = LATENT_PARTS[_parts(kv_args) - 1] if shape.latent else ("k", "v")
    if (windows := shape.windows) is None:
        first = int(getattr(kv_args, "prefill_start_layer", 0) or 0) if shape.pp_size > 1 else 0
        layers = max(1, len(buffers.pointers) // len(planes))
        group = _group(kind, planes, buffers, range(first, first + layers), page_size, shape)
        return KVCacheView((group,))
    theirs = (kv_args.state_data_ptrs[0], kv_args.state_data_lens[0], kv_args.state_item_lens[0])
    keep_all = _group(kind, planes, buffers, windows.others, page_size, shape)
    keep_window = _group(
        f"slidingwindow:{windows.tokens}", planes, _Buffers("state", *theirs), windows.windowed, page_size,
        shape._replace(heads=windows.heads),
    )  # fmt: skip
    if windows.total_heads != shape.total_heads:  # heads are counted once a cache: such pages go as they are
        keep_window = keep_window._replace(canonical=())
    return KVCacheView((keep_all, keep_window))


class _Buffers(NamedTuple):
    """A pool as KVArgs tells it; ``prefix``: of the fields that do."""

    prefix: str
    pointers: Sequence[int]
    lengths: Sequence[int]
    item_lengths: Sequence[int]


def _group(
    kind: str, planes: Sequence[str], given: _Buffers, layers: Sequence[int], page_size: int, shape: PoolShape
) -> GroupView:
    """``layers``: numbers in the model, in the pool's order."""
    count = len(layers)
    if len(given.pointers) != count * len(planes):
        raise ValueError(
            f"{given.prefix}_data_ptrs has {len(given.pointers)} buffers, expected {len(planes)} for each of "
            f"{count} layers"
        )
    buffers = [
        _buffer(address, length, item, page_size, shape, given.prefix)
        for address, length, item in zip(given.pointers, given.lengths, given.item_lengths, strict=True)
    ]
    axes = ("page", "token", "head", "dim")
    in_parts = planes == LATENT_PARTS[1]
    if in_parts and os.environ.get(TILES_ENV, "").lower() in ("1", "true"):
        axes = ("page", "tile", "token", "dim")
        buffers = [_in_tiles(buffer, given.prefix) for buffer in buffers]
    named = [
        (
            f"model.layers.{layer}.self_attn.attn",
            [(plane, buffers[index * count + place], axes) for index, plane in enumerate(planes)],
        )
        for place, layer in enumerate(layers)
    ]
    canonical = tuple(
        found
        for index, (plane, buffer, _) in enumerate(named[0][1])
        for found in strided_planes(plane, buffer, axes, index)
        if not in_parts  # no single plane: such pages go as they are
    )
    return group_view(kind, page_size, buffers[0].shape[0], named, heads=shape.heads, canonical=canonical)


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
        head_dim=next((plane.dim for plane in view.groups[0].canonical), 0),
        groups=tuple(group.schema() for group in view.groups),
        tp_rank=shape.tp_rank,
        tp_size=shape.tp_size,
        pp_rank=shape.pp_rank,
        pp_size=shape.pp_size,
        weights=shape.weights,
    )


def _buffer(
    address: int, length: int, item_len: int, page_size: int, shape: PoolShape, prefix: str
) -> _Buffer:
    item = DTYPE_BITS[shape.dtype] // 8
    channels, rest = divmod(int(item_len), page_size * shape.heads * item)
    if rest or not channels:
        raise ValueError(
            f"{prefix}_item_lens: {item_len} bytes a page are no multiple of {page_size} tokens x "
            f"{shape.heads} heads x {item} bytes ({shape.dtype})"
        )
    return _Buffer(int(address), (int(length) // int(item_len), page_size, shape.heads, channels), item)


def _in_tiles(buffer: _Buffer, prefix: str) -> _Buffer:
    pages, page_size, _, channels = buffer.shape
    if channels % TILE:
        raise ValueError(f"{prefix}_item_lens: {channels} channels are no multiple of {TILE} (${TILES_ENV})")
    return buffer._replace(shape=(pages, channels // TILE, page_size, TILE))


def _parts(kv_args: Any) -> int:
    """Of a latent; 1 where KVArgs does not say."""
    return int(getattr(kv_args, "kv_buf_groups", 1) or 1)


def _refuse(kv_args: Any, shape: PoolShape) -> None:
    """Pools whose content is more than pages of K and V, or a latent, in plain order."""
    names = state_names(kv_args)
    if names and (names != [STATE_TYPE] or shape.latent):
        what = "of a latent pool " if names == [STATE_TYPE] else ""
        raise ValueError(
            f"state_types [{', '.join(names)}] {what}can't be transferred by sage_kvt; allowed: none, {STATE_TYPE} "
            "with pages of K and V. Serve this model with another transfer backend, or by one server"
        )
    order = getattr(kv_args, "swa_kv_cache_layout", None)
    if names and order != "nhd":
        raise ValueError(
            f"swa_kv_cache_layout {order!r} can't be transferred by sage_kvt; allowed: nhd, or {ONE_POOL}"
        )
    allowed = (1, 2) if shape.latent else (1,)
    if (parts := _parts(kv_args)) not in allowed:  # 3: an indexer's keys, of some layers
        raise ValueError(
            f"kv_buf_groups {parts} can't be transferred by sage_kvt; allowed: {', '.join(map(str, allowed))}"
        )
    layout = os.environ.get(LAYOUT_ENV, "nhd").lower()
    if layout != "nhd":
        raise ValueError(f"${LAYOUT_ENV} {layout!r} can't be transferred by sage_kvt; allowed: nhd")
    for name in ("kv_layout", "kv_layer_ids", "num_draft_entries"):
        if value := getattr(kv_args, name, None):
            raise ValueError(f"{name} {value!r} can't be transferred by sage_kvt; allowed: none")
