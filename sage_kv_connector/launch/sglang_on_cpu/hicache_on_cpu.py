# SPDX-License-Identifier: Apache-2.0
"""What HiCache's host pool needs of CUDA and of a large machine, done without: nothing to register, plain copies
of pages, and a smaller reserve of memory.

SGLang's host pool registers its memory with CUDA and moves pages by ``sgl_kernel.kvcacheio``, which a machine
without CUDA lacks. These do the same between two tensors in host memory. Signatures: SGLang 0.5.23,
``mem_cache/pool_host/mha.py``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any


def register_nothing(*_: object, **__: object) -> None:
    """In place of cudaHostRegister: on a CPU all memory is within reach."""


def copy_slots(
    src_layers: Sequence[Any], dst_layers: Sequence[Any], src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """Token slots of each layer, ``(tokens, heads, channels)`` on both sides."""
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


def copy_from_pages(
    src_ptrs: Sequence[Any],
    dst_ptrs: Sequence[Any],
    src_indices: Any,
    dst_indices: Any,
    layer_id: int,
    page_size: int,
) -> None:
    """One layer out of ``(pages, layers, page_size, heads, channels)``."""
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        dst[dst_indices] = src[src_indices // page_size, layer_id, src_indices % page_size]


def copy_to_pages(
    src_ptrs: Sequence[Any], dst_ptrs: Sequence[Any], src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """All layers, first K's and then V's, into ``(pages, layers, page_size, heads, channels)`` of K and V."""
    layers = len(src_ptrs) // len(dst_ptrs)
    for index, src in enumerate(src_ptrs):
        dst_ptrs[index // layers][dst_indices // page_size, index % layers, dst_indices % page_size] = src[
            src_indices
        ]


#: Module of SGLang → names in it and what they are replaced by.
REPLACED: dict[str, dict[str, Callable[..., None] | int]] = {
    # SGLang leaves 10 GiB of memory to others, more than small machines have beside two servers.
    "sglang.srt.mem_cache.pool_host.base": {"HICACHE_HOST_MEMORY_RESERVE_BYTES": 1 << 30},
    "sglang.srt.mem_cache.pool_host.common": {
        "_cuda_host_register": register_nothing,
        "_cuda_host_unregister": register_nothing,
    },
    "sglang.srt.mem_cache.pool_host.mha": {
        "transfer_kv_direct": copy_slots,
        "transfer_kv_per_layer_direct_pf_lf": copy_from_pages,
        "transfer_kv_all_layer_direct_lf_pf": copy_to_pages,
    },
}


def replace(module: types.ModuleType) -> None:
    for name, replacement in REPLACED[module.__name__].items():
        setattr(module, name, replacement)


#: What is done to each module once it is loaded.
DEEDS = dict.fromkeys(REPLACED, replace)
