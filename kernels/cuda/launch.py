# SPDX-License-Identifier: Apache-2.0
"""Arguments of the CUDA and HIP kernels: ``kv::Shape`` and ``kv::Plane`` of kv_tile.cuh."""

from __future__ import annotations

import ctypes

from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.plane import Range

GRANULARITIES = ("none", "tensor", "channel", "token", "head")
#: dtype → type in kv_arithmetic.h.
TYPE_NAMES = {"fp32": "Fp32", "fp16": "Fp16", "bf16": "Bf16", "fp8_e4m3": "Fp8E4m3", "fp8_e5m2": "Fp8E5m2"}
WIRE_TYPE_NAMES = {dtype: f"{name}Wire" for dtype, name in (*TYPE_NAMES.items(), ("int4", "Int4"))}
THREADS = 256


class Shape(ctypes.Structure):
    """What all planes of a launch share. Strides in elements."""

    _fields_ = (
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("dim_stride", ctypes.c_int64),
        ("first_token", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("page_tokens", ctypes.c_int32),
        ("group_tokens", ctypes.c_int32),
        ("first_head", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("granularity", ctypes.c_int32),
        ("zero_point", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Plane(ctypes.Structure):
    """One plane: addresses of its table of page addresses and of its wire bytes, and the engine's scales."""

    _fields_ = (
        ("pages", ctypes.c_uint64),
        ("wire", ctypes.c_uint64),
        ("memory_scale", ctypes.c_float),
        ("wire_scale", ctypes.c_float),
    )


def launch_shape(
    strides: tuple[int, int, int], page_tokens: int, dim: int, tokens: Range, heads: Range, fmt: WireFormat
) -> Shape:
    """``strides`` of head, token and dim in elements. Raises ValueError for a rotated format."""
    if fmt.rotate:
        raise ValueError("rotate is for measurements with the NumPy reference; no kernel has it")
    return Shape(
        *strides, tokens.first, tokens.length, page_tokens, fmt.group_tokens, heads.first, heads.length, dim,
        GRANULARITIES.index(fmt.granularity), fmt.zero_point, 0,
    )  # fmt: skip


def tile_count(tokens: Range, heads: Range, fmt: WireFormat) -> int:
    """Blocks of a launch for one plane."""
    groups = (tokens.first + tokens.length - 1) // fmt.group_tokens - tokens.first // fmt.group_tokens + 1
    return groups * heads.length


def shared_bytes(dim: int, fmt: WireFormat) -> int:
    """Shared memory of a block: 4 bytes a scale of the largest tile, 8 with zero points."""
    return 4 * fmt.scale_count(fmt.group_tokens, dim) * (2 if fmt.zero_point else 1)
