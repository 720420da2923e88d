# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: one program gathers and encodes, or decodes and scatters, one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from sage_kv_connector.kernels.triton.arithmetic import (
    INFINITY,
    MAGNITUDE,
    SCALE_MAX,
    as_float,
    as_int,
    bf16_up,
    down_key,
    from_fp32,
    nibbles_of,
    of_key,
    scaled,
    to_fp32,
)


@triton.jit
def tile_place(
    index, tokens, heads, group_tokens, first_count, first_bytes, full_bytes, last_bytes
):  # fmt: skip
    """Head, first token of the span, tokens and wire offset of a tile."""
    group, head = index // heads, index % heads
    skipped = tl.where(group == 0, 0, first_count + (group - 1) * group_tokens)
    count = tl.where(group == 0, first_count, tl.minimum(group_tokens, tokens - skipped))
    last = skipped + count == tokens
    size = tl.where(group == 0, first_bytes, tl.where(last, last_bytes, full_bytes)).to(tl.int64)
    before = tl.where(group == 0, 0, heads * (first_bytes + (group - 1).to(tl.int64) * full_bytes))
    return head, skipped, count, before + head * size


@triton.jit
def element_offsets(
    table, skipped, count, head, first_head, first_slot, page_tokens, dim,
    page_stride, token_stride, head_stride, dim_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Offsets of a tile's elements in the plane, and which of the block there are."""
    token = tl.arange(0, BLOCK_TOKENS)
    channel = tl.arange(0, BLOCK_DIM)
    place = first_slot + skipped + token
    page = tl.load(table + place // page_tokens, mask=token < count, other=0)
    row = page * page_stride + (place % page_tokens).to(tl.int64) * token_stride
    row += (first_head + head).to(tl.int64) * head_stride
    offsets = row[:, None] + (channel.to(tl.int64) * dim_stride)[None, :]
    return offsets, (token < count)[:, None] & (channel < dim)[None, :]


@triton.jit
def encode_kernel(
    pages, table, wire8, wire16, wire32,
    tokens, heads, first_head, first_slot, page_tokens, dim, group_tokens,
    first_count, first_bytes, full_bytes, last_bytes,
    page_stride, token_stride, head_stride, dim_stride,
    reciprocal_up, memory_scale, wire_scale,
    MEMORY: tl.constexpr, WIRE: tl.constexpr, GRANULARITY: tl.constexpr, ZERO_POINT: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Pages to one tile. ``wire8``, ``wire16`` and ``wire32`` are the same memory, which was zero."""
    head, skipped, count, start = tile_place(
        tl.program_id(0), tokens, heads, group_tokens, first_count, first_bytes, full_bytes, last_bytes
    )  # fmt: skip
    offsets, inside = element_offsets(
        table, skipped, count, head, first_head, first_slot, page_tokens, dim,
        page_stride, token_stride, head_stride, dim_stride, BLOCK_TOKENS, BLOCK_DIM,
    )  # fmt: skip
    values = to_fp32(tl.load(pages + offsets, mask=inside, other=0), MEMORY)
    if MEMORY == "fp8_e4m3" or MEMORY == "fp8_e5m2":
        values = scaled(values, memory_scale)
    token = tl.arange(0, BLOCK_TOKENS)
    channel = tl.arange(0, BLOCK_DIM)
    element = token[:, None] * dim + channel[None, :]
    codes = start
    reciprocal = tl.full((1, 1), 1.0, tl.float32)
    zero = tl.full((1, 1), 0.0, tl.float32)
    if GRANULARITY == "tensor":
        reciprocal = tl.div_rn(1.0, tl.full((1, 1), wire_scale, tl.float32))
    if GRANULARITY == "channel" or GRANULARITY == "token" or GRANULARITY == "head":
        bits = as_int(values)
        magnitude = bits & MAGNITUDE
        magnitude = tl.where(inside & (magnitude < INFINITY), magnitude, 0)
        keys = tl.where(bits < 0, -magnitude, magnitude) if ZERO_POINT else magnitude
        high = tl.where(inside, keys, -INFINITY)
        low = tl.where(inside, keys, INFINITY)
        # Rows and columns of the block that are outside of the tile get harmless scales.
        if GRANULARITY == "channel":
            high = tl.max(high, axis=0)[None, :]
            low = tl.min(low, axis=0)[None, :]
            cell, present, scale_count = channel[None, :], (channel < dim)[None, :], dim
        elif GRANULARITY == "token":
            high = tl.max(high, axis=1)[:, None]
            low = tl.min(low, axis=1)[:, None]
            cell, present, scale_count = token[:, None], (token < count)[:, None], count
        else:
            high = tl.max(tl.max(high, axis=1), axis=0) + tl.zeros((1, 1), tl.int32)
            low = tl.min(tl.min(low, axis=1), axis=0) + tl.zeros((1, 1), tl.int32)
            cell = tl.zeros((1, 1), tl.int32)
            present, scale_count = cell == 0, 1
        high = tl.where(present, high, 0)
        section = ((2 * scale_count + 15) // 16) * 16
        if ZERO_POINT:
            zero = of_key(down_key(tl.where(present, low, 0)))
            steps = as_int((of_key(high) - zero) * reciprocal_up)
            scale = bf16_up(tl.minimum(steps, SCALE_MAX))
            zeros = (as_int(zero) >> 16).to(tl.int16)
            tl.store(wire16 + (start + section) // 2 + cell, zeros, mask=present)
            codes += 2 * section
        else:
            scale = bf16_up(as_int(as_float(high) * reciprocal_up))
            codes += section
        tl.store(wire16 + start // 2 + cell, (scale >> 16).to(tl.int16), mask=present)
        reciprocal = tl.div_rn(1.0, as_float(scale))
    if WIRE == "int4":
        nibbles = nibbles_of(values, reciprocal, zero, ZERO_POINT)
        even, odd = tl.split(tl.reshape(nibbles, (BLOCK_TOKENS, BLOCK_DIM // 2, 2)))
        pair = tl.arange(0, BLOCK_DIM // 2)
        target = codes + (token * (dim // 2))[:, None] + pair[None, :]
        mask = (token < count)[:, None] & (pair < dim // 2)[None, :]
        tl.store(wire8 + target, (even | (odd << 4)).to(tl.uint8), mask=mask)
    else:
        if GRANULARITY != "none":
            values = scaled(values, reciprocal)
        raw = from_fp32(values, WIRE)
        if WIRE == "fp32":
            tl.store(wire32 + codes // 4 + element, raw, mask=inside)
        elif WIRE == "fp16" or WIRE == "bf16":
            tl.store(wire16 + codes // 2 + element, raw, mask=inside)
        else:
            tl.store(wire8 + codes + element, raw, mask=inside)


@triton.jit
def decode_kernel(
    pages, table, wire8, wire16, wire32,
    tokens, heads, first_head, first_slot, page_tokens, dim, group_tokens,
    first_count, first_bytes, full_bytes, last_bytes,
    page_stride, token_stride, head_stride, dim_stride,
    reciprocal_up, memory_scale, wire_scale,
    MEMORY: tl.constexpr, WIRE: tl.constexpr, GRANULARITY: tl.constexpr, ZERO_POINT: tl.constexpr,  # noqa: N803
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One tile to pages; the same arguments as ``encode_kernel``."""
    head, skipped, count, start = tile_place(
        tl.program_id(0), tokens, heads, group_tokens, first_count, first_bytes, full_bytes, last_bytes
    )  # fmt: skip
    offsets, inside = element_offsets(
        table, skipped, count, head, first_head, first_slot, page_tokens, dim,
        page_stride, token_stride, head_stride, dim_stride, BLOCK_TOKENS, BLOCK_DIM,
    )  # fmt: skip
    token = tl.arange(0, BLOCK_TOKENS)
    channel = tl.arange(0, BLOCK_DIM)
    element = token[:, None] * dim + channel[None, :]
    codes = start
    section = start * 0
    cell = tl.zeros((1, 1), tl.int32)
    present = cell == 0
    if GRANULARITY == "channel" or GRANULARITY == "token" or GRANULARITY == "head":
        scale_count = 1
        if GRANULARITY == "channel":
            cell, present, scale_count = channel[None, :], (channel < dim)[None, :], dim
        elif GRANULARITY == "token":
            cell, present, scale_count = token[:, None], (token < count)[:, None], count
        section += ((2 * scale_count + 15) // 16) * 16
        codes += 2 * section if ZERO_POINT else section
    if WIRE == "int4":
        byte = tl.load(wire8 + codes + element // 2, mask=inside, other=0).to(tl.int32)
        nibbles = (byte >> ((element & 1) * 4)) & 0xF
        values = (nibbles if ZERO_POINT else (nibbles ^ 8) - 8).to(tl.float32)
    elif WIRE == "fp32":
        values = to_fp32(tl.load(wire32 + codes // 4 + element, mask=inside, other=0), WIRE)
    elif WIRE == "fp16" or WIRE == "bf16":
        values = to_fp32(tl.load(wire16 + codes // 2 + element, mask=inside, other=0), WIRE)
    else:
        values = to_fp32(tl.load(wire8 + codes + element, mask=inside, other=0), WIRE)
    if GRANULARITY == "tensor":
        values = scaled(values, wire_scale)
    if GRANULARITY == "channel" or GRANULARITY == "token" or GRANULARITY == "head":
        scale = to_fp32(tl.load(wire16 + start // 2 + cell, mask=present, other=0), "bf16")
        values = scaled(values, scale)
        if ZERO_POINT:
            zeros = tl.load(wire16 + (start + section) // 2 + cell, mask=present, other=0)
            values = values + to_fp32(zeros, "bf16")
    if MEMORY == "fp8_e4m3" or MEMORY == "fp8_e5m2":
        values = scaled(values, tl.div_rn(1.0, tl.full((1, 1), memory_scale, tl.float32)))
    tl.store(pages + offsets, from_fp32(values, MEMORY), mask=inside)
