# SPDX-License-Identifier: Apache-2.0
"""Conversion with plain torch operations, on any device that torch has.

Bit-identical to format/reference.py where the device multiplies, adds and divides fp32
with IEEE rounding; the rest are operations on the integers that the bits are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from sage_kv_connector.format.reference import RAW, levels, reciprocal_up, to_float
from sage_kv_connector.format.wire_format import (
    CODE_MAX,
    DTYPE_BITS,
    ENGINE_SCALED_DTYPES,
    SECTION_ALIGNMENT,
    WireFormat,
    dtype,
    tile_tokens,
)
from sage_kv_connector.kernels.plane import KVPlane, Range

_RAW = {
    name: {4: torch.int32, 2: torch.int16, 1: torch.uint8}[np.dtype(raw).itemsize]
    for name, raw in RAW.items()
}
#: dtype → (mantissa bits, exponent bias, code of the largest finite value, of infinity or None, of NaN).
_SMALL = {
    "fp16": (10, 15, 0x7BFF, 0x7C00, 0x7E00),
    "fp8_e4m3": (3, 7, 0x7E, None, 0x7F),
    "fp8_e5m2": (2, 15, 0x7B, None, 0x7E),
}
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000
_SCALE_MIN, _SCALE_MAX = 0x0D800000, 0x7F7F0000  # bits of 2**-100 and of the largest bf16


class Kernels:
    """``DeviceKernels`` for every device type."""

    def __init__(self, device_type: str) -> None:
        self.name = f"torch on {device_type}"

    def encode(self, plane: KVPlane, tokens: Range, heads: Range, fmt: WireFormat) -> torch.Tensor:
        plane.check(tokens, heads, fmt)
        page, slot = _places(plane, tokens)
        raw = _raw_pages(plane, heads)[page, slot].transpose(0, 1)  # (heads, tokens, dim)
        values = to_fp32(raw, plane.dtype)
        if plane.dtype in ENGINE_SCALED_DTYPES:
            values = _scaled(values, plane.memory_scale)
        parts, first = [], 0
        for groups, count in _equal_groups(tokens, fmt):
            run = values[:, first : first + groups * count]
            tiles = run.unflatten(1, (groups, count)).transpose(0, 1)
            parts.append(encode_tiles(tiles, fmt, plane.wire_scale).reshape(-1))
            first += groups * count
        return torch.cat(parts)

    def decode(
        self, wire: torch.Tensor, plane: KVPlane, tokens: Range, heads: Range, fmt: WireFormat
    ) -> None:
        plane.check(tokens, heads, fmt)
        plane.check_wire(wire.numel(), tokens, heads, fmt)
        dim = plane.pages.shape[3]
        page, slot = _places(plane, tokens)
        pages, start, first = _raw_pages(plane, heads), 0, 0
        for groups, count in _equal_groups(tokens, fmt):
            size = groups * heads.length * fmt.tile_bytes(count, dim)
            tiles = wire[start : start + size].view(groups, heads.length, -1)
            values = decode_tiles(tiles, fmt, count, dim, plane.wire_scale)
            if plane.dtype in ENGINE_SCALED_DTYPES:
                values = _scaled(values, 1 / _fp32(plane.memory_scale, wire.device))
            rows = values.transpose(1, 2).reshape(groups * count, heads.length, dim)
            places = slice(first, first + groups * count)
            pages[page[places], slot[places]] = from_fp32(rows, plane.dtype)
            start, first = start + size, first + groups * count


def _equal_groups(tokens: Range, fmt: WireFormat) -> list[tuple[int, int]]:
    """Runs of token groups of one size: (groups, tokens of each)."""
    runs: list[tuple[int, int]] = []
    for count in tile_tokens(tokens.first, tokens.length, fmt.group_tokens):
        if runs and runs[-1][1] == count:
            runs[-1] = (runs[-1][0] + 1, count)
        else:
            runs.append((1, count))
    return runs


def _places(plane: KVPlane, tokens: Range) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and slot in it of each token."""
    page_tokens = plane.pages.shape[1]
    places = np.arange(tokens.first, tokens.first + tokens.length)
    table = np.asarray(plane.block_table, np.int64)
    device = plane.pages.device
    return (
        torch.from_numpy(table[places // page_tokens]).to(device),
        torch.from_numpy(places % page_tokens).to(device),
    )


def _raw_pages(plane: KVPlane, heads: Range) -> torch.Tensor:
    pages: torch.Tensor = plane.pages.narrow(2, heads.first, heads.length)
    return pages.view(_RAW[plane.dtype])


def _fp32(value: float, device: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def _scaled(values: torch.Tensor, factor: Any) -> torch.Tensor:
    """A NaN keeps its sign."""
    return torch.where(values.isnan(), values, values * factor)


# -- elements


@cache
def _values_of_codes(dtype: str, device: torch.device) -> torch.Tensor:
    raw = np.arange(1 << (8 * np.dtype(RAW[dtype]).itemsize), dtype=np.int64).astype(RAW[dtype])
    return torch.from_numpy(to_float(raw, dtype).view(np.int32).copy()).to(device)


def to_fp32(raw: torch.Tensor, dtype: str) -> torch.Tensor:
    """The exact values of raw bits (int32, int16 or uint8), any shape."""
    if dtype == "fp32":
        return raw.view(torch.float32)
    if dtype == "bf16":
        return (raw.to(torch.int32) << 16).view(torch.float32)
    codes = raw.to(torch.int64) & (0xFFFF if dtype == "fp16" else 0xFF)
    return _values_of_codes(dtype, raw.device)[codes].view(torch.float32)


def from_fp32(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Raw bits: nearest even, finite values saturate, a NaN keeps nothing but its sign."""
    bits = values.contiguous().view(torch.int32)
    magnitude = bits & _MAGNITUDE
    if dtype == "fp32":
        return torch.where(magnitude > _INFINITY, (bits & ~_MAGNITUDE) | 0x7FC00000, bits)
    if dtype == "bf16":
        finite = magnitude.clamp(max=_SCALE_MAX)
        code = (finite + 0x7FFF + ((finite >> 16) & 1)) >> 16
        infinity, nan, sign = 0x7F80, 0x7FC0, (bits >> 16) & 0x8000
    else:
        mantissa, bias, largest, special, nan = _SMALL[dtype]
        shift = 23 - mantissa
        finite = magnitude.clamp(max=(largest << shift) + ((127 - bias) << 23))
        half = (1 << (shift - 1)) - 1 - ((127 - bias) << 23)
        normal = (finite + half + ((finite >> shift) & 1)) >> shift
        # One unit in the last place of this power of two is the smallest denormal.
        magic = (128 - bias + shift) << 23
        power = torch.tensor(magic, dtype=torch.int32, device=bits.device).view(torch.float32)
        denormal = (finite.view(torch.float32) + power).view(torch.int32) - magic
        code = torch.where(finite < (128 - bias) << 23, denormal, normal)
        infinity = largest if special is None else special
        sign = (bits >> 16) & 0x8000 if dtype == "fp16" else (bits >> 24) & 0x80
    code = torch.where(magnitude == _INFINITY, infinity, code)
    code = torch.where(magnitude > _INFINITY, nan, code) | sign
    return code.to(_RAW[dtype])


# -- scales, as bits of fp32 whose low half is zero


def _bf16_up(bits: torch.Tensor) -> torch.Tensor:
    return ((bits + 0xFFFF) & ~0xFFFF).clamp(_SCALE_MIN, _SCALE_MAX)


def _scales(values: torch.Tensor, fmt: WireFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points of tiles (…, tokens, dim), kept in shapes that broadcast over them."""
    axes = {"channel": (-2,), "token": (-1,), "head": (-2, -1)}[fmt.granularity]
    bits = values.contiguous().view(torch.int32)
    magnitude = bits & _MAGNITUDE
    magnitude = torch.where(magnitude < _INFINITY, magnitude, 0)
    if not fmt.zero_point:
        largest = magnitude.amax(dim=axes, keepdim=True).view(torch.float32)
        scale = _bf16_up((largest * float(reciprocal_up(CODE_MAX[fmt.dtype]))).view(torch.int32))
        return scale.view(torch.float32), torch.zeros_like(scale).view(torch.float32)
    keys = torch.where(bits < 0, -magnitude, magnitude)  # ordered as the floats, one zero
    low, high = keys.amin(dim=axes, keepdim=True), keys.amax(dim=axes, keepdim=True)
    down = torch.where(low < 0, -((0xFFFF - low) & ~0xFFFF).clamp(max=_SCALE_MAX), low & ~0xFFFF)
    zero = _of_key(down)
    span = _of_key(high) - zero
    steps = (span * float(reciprocal_up(levels(fmt.dtype)))).view(torch.int32)
    return _bf16_up(steps.clamp(max=_SCALE_MAX)).view(torch.float32), zero


def _of_key(keys: torch.Tensor) -> torch.Tensor:
    return torch.where(keys < 0, -keys | ~_MAGNITUDE, keys).view(torch.float32)


# -- tiles


def encode_tiles(values: torch.Tensor, fmt: WireFormat, wire_scale: float = 1.0) -> torch.Tensor:
    """fp32 (…, tokens, dim) → uint8 (…, bytes of a tile)."""
    if fmt.granularity in ("none", "tensor"):
        if fmt.granularity == "tensor":
            values = _scaled(values, 1 / _fp32(wire_scale, values.device))
        return _section(from_fp32(values, fmt.dtype))
    scale, zero = _scales(values, fmt)
    sections = [_section(_bf16_bits(scale))]
    if dtype(fmt.dtype).kind == "float":
        sections.append(_section(from_fp32(_scaled(values, 1 / scale), fmt.dtype)))
        return torch.cat(sections, dim=-1)
    numbers = torch.where(values.isnan(), 0.0, values)
    if fmt.zero_point:
        sections.append(_section(_bf16_bits(zero)))
        codes = ((numbers - zero) * (1 / scale)).clamp(0, levels(fmt.dtype))
    else:
        codes = (numbers * (1 / scale)).clamp(-CODE_MAX[fmt.dtype], CODE_MAX[fmt.dtype])
    if DTYPE_BITS[fmt.dtype] == 8:
        sections.append(_section((codes.round().to(torch.int32) & 0xFF).to(torch.uint8)))
        return torch.cat(sections, dim=-1)
    nibbles = (codes.round().to(torch.int32) & 0xF).to(torch.uint8).flatten(-2)
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2))
    sections.append(_section(nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), rows=False))
    return torch.cat(sections, dim=-1)


def decode_tiles(
    tiles: torch.Tensor, fmt: WireFormat, tokens: int, dim: int, wire_scale: float = 1.0
) -> torch.Tensor:
    """uint8 (…, bytes of a tile) → fp32 (…, tokens, dim)."""
    scale_bytes, zero_bytes, _ = fmt.sections(tokens, dim)
    codes = tiles[..., scale_bytes + zero_bytes :]
    if dtype(fmt.dtype).kind == "integer" and DTYPE_BITS[fmt.dtype] == 8:
        bytes_ = codes[..., : tokens * dim].contiguous()
        values = (bytes_ if fmt.zero_point else bytes_.view(torch.int8)).to(torch.float32)
        values = values.unflatten(-1, (tokens, dim))
    elif fmt.dtype == "int4":
        nibbles = torch.stack([codes & 0xF, codes >> 4], dim=-1).flatten(-2)[..., : tokens * dim]
        numbers = nibbles.to(torch.int32)
        values = (numbers if fmt.zero_point else (numbers ^ 8) - 8).to(torch.float32)
        values = values.unflatten(-1, (tokens, dim))
    else:
        size = tokens * dim * np.dtype(RAW[fmt.dtype]).itemsize
        raw = codes[..., :size].contiguous().view(_RAW[fmt.dtype])
        values = to_fp32(raw.unflatten(-1, (tokens, dim)), fmt.dtype)
    if fmt.granularity == "none":
        return values
    if fmt.granularity == "tensor":
        return _scaled(values, _fp32(wire_scale, values.device))
    shape = {"channel": (1, dim), "token": (tokens, 1), "head": (1, 1)}[fmt.granularity]
    count = 2 * fmt.scale_count(tokens, dim)

    def bf16_section(start: int) -> torch.Tensor:
        raw = tiles[..., start : start + count].contiguous().view(torch.int16)
        return to_fp32(raw, "bf16").unflatten(-1, shape)

    values = _scaled(values, bf16_section(0))
    return values + bf16_section(scale_bytes) if fmt.zero_point else values


def _bf16_bits(values: torch.Tensor) -> torch.Tensor:
    return (values.contiguous().view(torch.int32) >> 16).to(torch.int16)


def _section(raw: torch.Tensor, rows: bool = True) -> torch.Tensor:
    """Raw elements as bytes of a section, padded; ``rows``: the last two axes are one tile's."""
    data = (raw.flatten(-2) if rows else raw).contiguous().view(torch.uint8)
    return torch.nn.functional.pad(data, (0, -data.shape[-1] % SECTION_ALIGNMENT))
