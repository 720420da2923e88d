# SPDX-License-Identifier: Apache-2.0
"""docs/format.md in NumPy: slow, plain, and what every kernel must equal bit for bit.

All arithmetic is IEEE fp32 with round to nearest even; each step that rounds is one
NumPy operation here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.dtypes import CODE_MAX, CONVERTIBLE_DTYPES, DTYPE_BITS, dtype
from sage_kv_connector.format.wire_format import WireFormat, _padded

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

#: Bytes of an element in memory → NumPy's type of its raw bits.
RAW = {name: {32: np.uint32, 16: np.uint16, 8: np.uint8}[DTYPE_BITS[name]] for name in CONVERTIBLE_DTYPES}

#: dtype → (exponent bits, mantissa bits, exponent bias, code of the largest finite value, code of NaN).
_FP8 = {"fp8_e4m3": (4, 3, 7, 0x7E, 0x7F), "fp8_e5m2": (5, 2, 15, 0x7B, 0x7E)}

#: Scales lie in [2**-100, largest bf16]: denormal elements become zero whether a device flushes them or not.
SCALE_MIN = np.float32(2.0**-100)
SCALE_MAX = np.array(0x7F7F0000, np.uint32).view(np.float32)[()]


def levels(integer: str) -> float:
    """The largest code of an integer dtype with a zero point, from which codes count."""
    return float((1 << DTYPE_BITS[integer]) - 1)


def reciprocal_up(value: float) -> np.float32:
    """The smallest fp32 that is at least 1/value."""
    found = np.float32(1.0 / value)
    return found if float(found) >= 1.0 / value else np.nextafter(found, np.float32(np.inf))


# -- elements


def to_float(raw: npt.NDArray[np.generic], dtype: str) -> F32:
    """The exact fp32 values of raw bits."""
    values: F32
    if dtype == "fp32":
        values = raw.view(np.float32)
        return values
    if dtype == "fp16":
        return raw.view(np.float16).astype(np.float32)
    if dtype == "bf16":
        values = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values
    values = _fp8_values(dtype)[raw]
    return values


def from_float(values: F32, dtype: str) -> npt.NDArray[np.generic]:
    """Raw bits of fp32 values: round to nearest even; finite values saturate, see docs/format.md."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "fp32":
        return _quiet(values).view(np.uint32)
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        bits = half.view(np.uint16).copy()
        over = np.isinf(half) & np.isfinite(values)
        bits[over] -= np.uint16(1)
        bits[np.isnan(values)] = (bits[np.isnan(values)] & 0x8000) | 0x7E00
        return bits
    bits32 = values.view(np.uint32)
    if dtype == "bf16":
        rounded = ((bits32 + np.uint32(0x7FFF) + ((bits32 >> 16) & 1)) >> 16).astype(np.uint16)
        over = ((rounded & 0x7FFF) == 0x7F80) & np.isfinite(values)
        rounded[over] -= np.uint16(1)
        rounded[np.isinf(values)] = (bits32[np.isinf(values)] >> 16).astype(np.uint16)
        nan = np.isnan(values)
        rounded[nan] = ((bits32[nan] >> 16) & 0x8000).astype(np.uint16) | 0x7FC0
        return rounded
    return _to_fp8(values, dtype)


def _quiet(values: F32) -> F32:
    bits = values.view(np.uint32).copy()
    nan = np.isnan(values)
    bits[nan] = (bits[nan] & np.uint32(0x80000000)) | np.uint32(0x7FC00000)
    return bits.view(np.float32)


def _fp8_values(dtype: str) -> F32:
    """The value of each of the 256 codes."""
    exponent_bits, mantissa_bits, bias, _, _ = _FP8[dtype]
    codes = np.arange(256)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    steps = np.where(exponent == 0, mantissa, mantissa + (1 << mantissa_bits)).astype(np.float64)
    values = steps * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)
    if dtype == "fp8_e4m3":
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        values[(codes & 0x7F) == 0x7C] = np.inf
        values[(codes & 0x7F) > 0x7C] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


def _to_fp8(values: F32, dtype: str) -> U8:
    """By distance: of all finite codes the nearest value, ties to the even code."""
    _, _, _, largest, nan_code = _FP8[dtype]
    grid = _fp8_values(dtype)[: largest + 1].astype(np.float64)
    magnitude = np.abs(values.astype(np.float64))
    magnitude = np.minimum(np.where(np.isnan(magnitude), 0.0, magnitude), grid[-1])
    above = np.clip(np.searchsorted(grid, magnitude), 1, largest)
    to_low, to_high = magnitude - grid[above - 1], grid[above] - magnitude
    even_is_low = (above - 1) % 2 == 0
    code = np.where((to_low < to_high) | ((to_low == to_high) & even_is_low), above - 1, above)
    code = np.where(np.isnan(values), nan_code, code) | np.where(np.signbit(values), 0x80, 0)
    return np.asarray(code, dtype=np.uint8)


# -- scales


def bf16_up(values: F32) -> F32:
    """The smallest bf16 that is at least each (positive) value."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def bf16_down(values: F32) -> F32:
    """The largest bf16 that is at most each finite value, at least the lowest finite bf16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    away = (bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    cut = np.where(bits >> 31, away, bits & np.uint32(0xFFFF0000)).astype(np.uint32)
    return np.maximum(cut.view(np.float32), -SCALE_MAX)


def scales_of(values: F32, fmt: WireFormat) -> tuple[F32, F32]:
    """Scales and zero points of a tile, shaped to broadcast over (tokens, dim); non-finite elements don't count."""
    axis = {"channel": (0,), "token": (1,), "head": (0, 1)}[fmt.granularity]
    finite = np.where(np.isfinite(values), values, np.float32(0))
    if not fmt.zero_point:
        largest = np.abs(finite).max(axis=axis, keepdims=True)
        scale = bf16_up(largest * reciprocal_up(CODE_MAX[fmt.dtype]))  # the fp32 reciprocal, rounded up
        return np.clip(scale, SCALE_MIN, SCALE_MAX), np.zeros_like(scale)
    zero = bf16_down(finite.min(axis=axis, keepdims=True)) + np.float32(0)  # -0 becomes +0
    with np.errstate(over="ignore"):
        span = finite.max(axis=axis, keepdims=True) - zero
    scale = bf16_up(np.minimum(span * reciprocal_up(levels(fmt.dtype)), SCALE_MAX))
    return np.clip(scale, SCALE_MIN, SCALE_MAX), zero


# -- tiles


def encode_tile(values: F32, fmt: WireFormat, tensor_scale: float = 1.0) -> U8:
    """(tokens, dim) fp32 values → the tile's bytes."""
    tokens, dim = values.shape
    values = np.ascontiguousarray(values, np.float32)
    if fmt.rotate:
        values = rotate(np.where(np.isfinite(values), values, np.float32(0)))
    if fmt.granularity == "none":
        return _section(from_float(values, fmt.dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        if fmt.granularity == "tensor":
            return _section(from_float(values * (np.float32(1) / np.float32(tensor_scale)), fmt.dtype))
        scale, zero = scales_of(values, fmt)
        if dtype(fmt.dtype).kind == "float":
            codes = from_float(values * (np.float32(1) / scale), fmt.dtype)
            return np.concatenate([_section(_bf16(scale)), _section(codes)])
        numbers = np.where(np.isnan(values), np.float32(0), values)
        steps = (
            (numbers - zero) * (np.float32(1) / scale)
            if fmt.zero_point
            else numbers * (np.float32(1) / scale)
        )
    if fmt.zero_point:
        codes = np.rint(np.clip(steps, 0, levels(fmt.dtype))).astype(np.uint8)
        head = [_section(_bf16(scale)), _section(_bf16(zero))]
    else:
        most = CODE_MAX[fmt.dtype]
        codes = np.rint(np.clip(steps, -most, most)).astype(np.int8).view(np.uint8)
        head = [_section(_bf16(scale))]
    if DTYPE_BITS[fmt.dtype] == 8:
        return np.concatenate([*head, _section(codes)])
    flat = np.concatenate([codes.reshape(-1) & 0xF, np.zeros(tokens * dim % 2, np.uint8)])
    return np.concatenate([*head, _section(flat[0::2] | (flat[1::2] << 4))])


def decode_tile(tile: U8, fmt: WireFormat, tokens: int, dim: int, tensor_scale: float = 1.0) -> F32:
    """A tile's bytes → (tokens, dim) fp32 values."""
    scale_bytes, zero_bytes, _ = fmt.sections(tokens, dim)
    codes = tile[scale_bytes + zero_bytes :]
    if dtype(fmt.dtype).kind == "integer":
        flat = codes
        if DTYPE_BITS[fmt.dtype] == 4:
            flat = np.stack([codes & 0xF, codes >> 4], axis=1).reshape(-1)
            if not fmt.zero_point:
                flat = ((flat ^ 8).astype(np.int8) - 8).view(np.uint8)
        flat = np.ascontiguousarray(flat[: tokens * dim])
        plain = (flat if fmt.zero_point else flat.view(np.int8)).astype(np.float32).reshape(tokens, dim)
    else:
        raw = codes.view(RAW[fmt.dtype])[: tokens * dim].reshape(tokens, dim)
        plain = to_float(raw, fmt.dtype)
    if fmt.granularity == "none":
        return plain
    with np.errstate(over="ignore", invalid="ignore"):
        if fmt.granularity == "tensor":
            return plain * np.float32(tensor_scale)
        shape = {"channel": (1, dim), "token": (tokens, 1), "head": (1, 1)}[fmt.granularity]
        count = fmt.scale_count(tokens, dim)
        scale = to_float(tile[: 2 * count].view(np.uint16), "bf16").reshape(shape)
        values = plain * scale
        if fmt.zero_point:
            zeros = tile[scale_bytes : scale_bytes + 2 * count].view(np.uint16)
            values = values + to_float(zeros, "bf16").reshape(shape)
    return rotate(values) if fmt.rotate else values


def rotate(values: F32) -> F32:
    """Each row times the normalised Hadamard matrix (its own inverse); butterflies from stride 1 up."""
    rows, dim = values.shape
    if dim & (dim - 1):
        raise ValueError(f"dim is {dim}, rotation needs a power of two")
    out = values.astype(np.float32)
    stride = 1
    while stride < dim:
        pairs = out.reshape(rows, dim // (2 * stride), 2, stride)
        low, high = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        out = np.stack([low + high, low - high], axis=2).reshape(rows, dim)
        stride *= 2
    return out * np.float32(1.0 / np.sqrt(dim))


def _bf16(values: F32) -> npt.NDArray[np.uint16]:
    return (np.ascontiguousarray(values).reshape(-1).view(np.uint32) >> 16).astype(np.uint16)


def _section(raw: npt.NDArray[np.generic]) -> U8:
    data = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    return np.concatenate([data, np.zeros(_padded(data.nbytes) - data.nbytes, np.uint8)])
