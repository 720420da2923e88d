# SPDX-License-Identifier: Apache-2.0
"""Caches as vLLM's releases and attention backends lay them out, in memory that a test can put anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_cache_interface import (
    KVCacheTensor,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    compute_layer_kv_cache_shape_bytes,
    compute_layout_strides,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.integrations.vllm_workers import BLOCKS, DIM, HEADS, LAYERS, PAGE, SPEC

LATENT = MLAAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=96, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(
    block_size=PAGE, num_kv_heads=HEADS, head_size=DIM, dtype=torch.bfloat16, sliding_window=2 * PAGE
)
STATE = MambaSpec(block_size=PAGE, shapes=((4, 24), (2, 8, 8)), dtypes=(torch.bfloat16, torch.float32))


class Cache(NamedTuple):
    """``layers``: what vLLM registers of each; ``memory``: uint8, what they are views of.

    ``axes`` names the axes of a layer's tensors: B blocks, N tokens, 2 K and V, any other letter their content.
    """

    memory: list[torch.Tensor]
    layers: dict[str, Any]
    axes: dict[str, str]

    def fill(self, seed: int) -> None:
        """Random bytes that make no NaN: of these a device's kernels keep the sign alone."""
        rng = np.random.default_rng(seed)
        for one in self.memory:
            drawn = rng.integers(0, 255, len(one), dtype=np.uint8)
            one.copy_(torch.from_numpy(np.where(drawn == 0x7F, np.uint8(0), drawn)))

    def rows(self, layer: str) -> npt.NDArray[np.uint8]:
        """Bytes of each token, or of each page of a state, page after page: K and V of each head in turn."""
        given, axes = self.layers[layer], self.axes[layer]
        tensors = given if isinstance(given, tuple | list) else [given]
        found = []
        for tensor in tensors:
            places = [axes.index(axis) for axis in "BNH2" if axis in axes]
            rest = [i for i in range(tensor.dim()) if i not in places]
            ordered = tensor.permute(*places, *rest).contiguous().view(torch.uint8)
            per_row = ordered.shape[0] * (ordered.shape[1] if "N" in axes else 1)
            found.append(ordered.reshape(per_row, -1).numpy())
        if len(found) == 2 and "H" in axes:  # K's and V's heads in turn
            split = [one.reshape(len(one), HEADS, -1) for one in found]
            found = [np.concatenate(split, axis=2).reshape(len(found[0]), -1)]
        rows: npt.NDArray[np.uint8] = np.concatenate(found, axis=1)
        return rows


#: A cache of layers by their specs.
Make = Callable[[dict[str, Any]], Cache]


def current(name: str, kernel_block: int | None = None, blocks: int = BLOCKS) -> Make:
    """As vLLM 0.32 makes it: [blocks, heads, tokens, content] of each layer, the memory in the named order.

    Each kind of layer has memory of its own. ``kernel_block``: tokens of an attention kernel's blocks.
    """
    layout = KVCacheLayout[name]

    def make(specs: dict[str, Any]) -> Cache:
        made = Cache([], {}, {})
        for spec in {id(one): one for one in specs.values()}.values():
            names = [layer for layer, one in specs.items() if one is spec]
            attends = not isinstance(spec, MambaSpec)
            shape = compute_layer_kv_cache_shape_bytes(spec, blocks)
            strides = compute_layout_strides(spec, blocks, len(names), layout)
            raw = torch.zeros(len(names) * int(np.prod(shape)), dtype=torch.int8)
            placed = KVCacheTensor(len(raw), names, layer_stride=strides[0], block_stride=strides[1])
            views = create_kv_cache_views(
                raw, spec, blocks, layout, placed, kernel_block_size=kernel_block if attends else None
            )
            made.memory.append(raw.view(torch.uint8))
            made.layers.update(zip(names, views, strict=True))
            made.axes.update(dict.fromkeys(names, "BHNc" if attends else "Bhnc"))
        return made

    return make


def earlier(axes: str, memory: str = "", tensors: int = 1, kernel_block: int = 0) -> Make:
    """As releases before 0.32, and platforms of their own, make it: tensors of ``axes`` for each layer.

    ``memory``: the order of the same axes in memory, where it is another one.
    """

    def make(specs: dict[str, Any]) -> Cache:
        made = Cache([], {}, {})
        for layer, spec in specs.items():
            size = {
                "B": BLOCKS * spec.block_size // (kernel_block or spec.block_size),
                "N": kernel_block or spec.block_size,
                "H": spec.num_kv_heads,
                "2": 2,
                "D": spec.head_size,
            }
            order = memory or axes
            views = []
            for _ in range(tensors):
                raw = torch.zeros([size[axis] for axis in order], dtype=spec.dtype)
                made.memory.append(raw.view(torch.uint8).reshape(-1))
                views.append(raw.permute(*(order.index(axis) for axis in axes)))
            made.layers[layer] = views[0] if tensors == 1 else tuple(views)
            made.axes[layer] = axes
        return made

    return make


def states_apart(specs: dict[str, Any]) -> Cache:
    """As earlier releases: attention as today, of a state a list of tensors, which share each page."""
    attention = current("LBHNC")({name: one for name, one in specs.items() if not isinstance(one, MambaSpec)})
    for layer, spec in specs.items():
        if not isinstance(spec, MambaSpec):
            continue
        raw = torch.zeros((BLOCKS, spec.page_size_bytes), dtype=torch.uint8)
        tensors, at = [], 0
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
            nbytes = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
            tensors.append(raw[:, at : at + nbytes].view(dtype).unflatten(1, shape))
            at += nbytes
        attention.memory.append(raw.view(-1))
        attention.layers[layer] = tensors
        attention.axes[layer] = "Bhnc"
    return attention


class Layout(NamedTuple):
    """``kinds``: specs of the groups' layers. ``converts``: pages of another size or dtype can be made of it."""

    make: Make
    kinds: tuple[Any, ...] = (SPEC,)
    dtype: str = "auto"
    converts: bool = True

    def of_pages(self, tokens: int) -> Layout:
        """The same with other pages."""
        return self._replace(kinds=tuple(replace(kind, block_size=tokens) for kind in self.kinds))

    @property
    def groups(self) -> tuple[dict[str, Any], ...]:
        """Layers with their specs, by group."""
        return tuple(
            {f"{kind}.{layer}": spec for layer in range(LAYERS)} for kind, spec in enumerate(self.kinds)
        )


FP8 = replace(SPEC, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
#: A row's scales stand beside its codes.
SCALED = replace(FP8, kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD, state_content_bytes=2 * DIM + 8)
LAYOUTS: dict[str, Layout] = {
    **{name: Layout(current(name)) for name in KVCacheLayout.__members__},
    "LBHNC, smaller kernel blocks": Layout(current("LBHNC", kernel_block=8)),
    "[2, blocks, tokens, heads, dim]": Layout(earlier("2BNHD")),
    "[2, blocks, tokens, heads, dim], heads first in memory": Layout(earlier("2BNHD", "2BHND")),
    "[blocks, 2, tokens, heads, dim]": Layout(earlier("B2NHD")),
    "[blocks, 2, tokens, heads, dim], heads first in memory": Layout(earlier("B2NHD", "B2HND")),
    "[2, blocks, ...] of smaller kernel blocks": Layout(earlier("2BNHD", kernel_block=8)),
    "K and V apart": Layout(earlier("BNHD", tensors=2)),
    "latent [blocks, tokens, dim]": Layout(earlier("BND"), (LATENT,)),
    "latent [blocks, 1, tokens, dim]": Layout(current("LBHNC"), (LATENT,)),
    "latent, a block's layers side by side": Layout(current("BLHNC"), (LATENT,)),
    "windows beside full attention": Layout(current("LBHNC"), (SPEC, WINDOW)),
    "windows, heads outermost": Layout(current("LHBNC"), (SPEC, WINDOW)),
    "states": Layout(current("LBHNC"), (SPEC, STATE), converts=False),
    "states as tensors of their own": Layout(states_apart, (SPEC, STATE), converts=False),
    "states, smaller kernel blocks": Layout(
        current("LBHNC", kernel_block=8), (SPEC, STATE), converts=False
    ),
    "scales in the page": Layout(
        current("LBHNC"), (SCALED,), dtype="fp8_per_token_head", converts=False
    ),
    "scales in the page, heads outermost": Layout(
        current("LHBNC"), (SCALED,), dtype="fp8_per_token_head", converts=False
    ),
    "fp8 with scales": Layout(current("LBNHC"), (FP8,), dtype="fp8"),
    "fp8 with scales, heads outermost": Layout(current("LHBNC"), (FP8,), dtype="fp8"),
}  # fmt: skip
