# SPDX-License-Identifier: Apache-2.0
"""``DeviceKernels`` on Triton."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton

from sage_kv_connector.format.reference import levels, reciprocal_up
from sage_kv_connector.format.wire_format import CODE_MAX, WireFormat, tile_tokens
from sage_kv_connector.kernels import torch_fallback
from sage_kv_connector.kernels.plane import KVPlane, Range
from sage_kv_connector.kernels.triton.convert import decode_kernel, encode_kernel

#: Elements of a block that a program can hold; larger tiles, and odd rows of int4, go through torch.
MAX_BLOCK = 32768
RAW_DTYPES = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Kernels:
    """``DeviceKernels`` for devices that have a Triton backend, and in Triton's interpreter for any."""

    def __init__(self, device_type: str) -> None:
        self.name = f"triton on {device_type}"
        self.fallback = torch_fallback.Kernels(device_type)

    def encode(self, plane: KVPlane, tokens: Range, heads: Range, fmt: WireFormat) -> torch.Tensor:
        plane.check(tokens, heads, fmt)
        dim = plane.pages.shape[3]
        if not _fits(fmt, dim):
            return self.fallback.encode(plane, tokens, heads, fmt)
        wire = torch.zeros(
            plane.wire_bytes(tokens, heads, fmt), dtype=torch.uint8, device=plane.pages.device
        )  # padding stays zero
        _launch(encode_kernel, plane, wire, tokens, heads, fmt)
        return wire

    def decode(
        self, wire: torch.Tensor, plane: KVPlane, tokens: Range, heads: Range, fmt: WireFormat
    ) -> None:
        plane.check(tokens, heads, fmt)
        plane.check_wire(wire.numel(), tokens, heads, fmt)
        dim = plane.pages.shape[3]
        if not _fits(fmt, dim):
            return self.fallback.decode(wire, plane, tokens, heads, fmt)
        _launch(decode_kernel, plane, wire, tokens, heads, fmt)


def _block(fmt: WireFormat, dim: int) -> tuple[int, int]:
    return triton.next_power_of_2(fmt.group_tokens), max(2, triton.next_power_of_2(dim))


def _fits(fmt: WireFormat, dim: int) -> bool:
    tokens, channels = _block(fmt, dim)
    return tokens * channels <= MAX_BLOCK and not (fmt.dtype == "int4" and dim % 2)


def _launch(
    kernel: Any, plane: KVPlane, wire: torch.Tensor, tokens: Range, heads: Range, fmt: WireFormat
) -> None:
    page_tokens, dim = plane.pages.shape[1], plane.pages.shape[3]
    raw = plane.pages.view(RAW_DTYPES[plane.pages.element_size()])
    counts = tile_tokens(tokens.first, tokens.length, fmt.group_tokens)
    first_page = tokens.first // page_tokens
    table = torch.from_numpy(np.asarray(plane.block_table[first_page:], np.int64)).to(raw.device)
    page_stride, token_stride, head_stride, dim_stride = raw.stride()
    largest = levels("int4") if fmt.zero_point else CODE_MAX.get(fmt.dtype, 1.0)
    block_tokens, block_dim = _block(fmt, dim)
    kernel[(len(counts) * heads.length,)](
        raw, table, wire, wire.view(torch.int16), wire.view(torch.int32),
        tokens.length, heads.length, heads.first, tokens.first % page_tokens, page_tokens, dim,
        fmt.group_tokens, counts[0],
        fmt.tile_bytes(counts[0], dim), fmt.tile_bytes(fmt.group_tokens, dim), fmt.tile_bytes(counts[-1], dim),
        page_stride, token_stride, head_stride, dim_stride,
        float(reciprocal_up(largest)), plane.memory_scale, plane.wire_scale,
        MEMORY=plane.dtype, WIRE=fmt.dtype, GRANULARITY=fmt.granularity, ZERO_POINT=fmt.zero_point,
        BLOCK_TOKENS=block_tokens, BLOCK_DIM=block_dim, enable_fp_fusion=False,
    )  # fmt: skip
