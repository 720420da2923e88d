# SPDX-License-Identifier: Apache-2.0
"""The argument of kernels: ``kv::Launch`` of cuda/kv_launch.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.plane import Range

GRANULARITIES = ("none", "tensor", "channel", "token", "head")
#: dtype → type in cuda/kv_arithmetic.h.
TYPE_NAMES = {"fp32": "Fp32", "fp16": "Fp16", "bf16": "Bf16", "fp8_e4m3": "Fp8E4m3", "fp8_e5m2": "Fp8E5m2"}
WIRE_TYPE_NAMES = {dtype: f"{name}Wire" for dtype, name in (*TYPE_NAMES.items(), ("int4", "Int4"))}
MAX_PLANES = 4
#: Of ``Launch.data``: layers' planes take 16 bytes each, page ids 4.
DATA_BYTES = 8 * 473


class LaunchPlane(ctypes.Structure):
    """One canonical plane of all layers. Strides in elements, ``page_stride`` and ``wire_offset`` in bytes."""

    _fields_ = (
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("dim_stride", ctypes.c_int64),
        ("page_stride", ctypes.c_int64),
        ("wire_offset", ctypes.c_int64),
        ("group_tokens", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("granularity", ctypes.c_int32),
        ("zero_point", ctypes.c_int32),
    )


class LayerPlane(ctypes.Structure):
    """One plane of one layer: address of page 0, the engine's scale of fp8 memory, that of granularity "tensor"."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("memory_scale", ctypes.c_float),
        ("wire_scale", ctypes.c_float),
    )


class Launch(ctypes.Structure):
    """``data``: LayerPlanes, layer after layer, then int32 page ids."""

    _fields_ = (
        ("wire", ctypes.c_uint64),
        ("layer_bytes", ctypes.c_int64),
        ("first_token", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("page_tokens", ctypes.c_int32),
        ("first_head", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("planes", ctypes.c_int32),
        ("layers", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("plane", LaunchPlane * MAX_PLANES),
        ("data", ctypes.c_uint8 * DATA_BYTES),
    )


class PlaneLayout(NamedTuple):
    """Of one canonical plane: strides (head, token, dim) in elements, bytes from page to page, channels of a head."""

    strides: tuple[int, int, int]
    page_stride: int
    dim: int
    fmt: WireFormat


def launch_plane(layout: PlaneLayout, wire_offset: int = 0) -> LaunchPlane:
    """Raises ValueError for a rotated format."""
    fmt = layout.fmt
    if fmt.rotate:
        raise ValueError("rotate is for measurements with the NumPy reference; no kernel has it")
    return LaunchPlane(
        *layout.strides, layout.page_stride, wire_offset, fmt.group_tokens, layout.dim,
        GRANULARITIES.index(fmt.granularity), fmt.zero_point,
    )  # fmt: skip


def launch_argument(
    planes: Sequence[LaunchPlane],
    layers: Sequence[LayerPlane],
    ids: npt.NDArray[np.int32],
    **rest: int,
) -> Launch:
    """``layers``: for each layer one of each plane. ``ids``: the first for the page of the first token.

    ``rest``: the other fields. Raises ValueError for more than ``DATA_BYTES``.
    """
    data = b"".join(map(bytes, layers)) + ids.tobytes()
    if len(data) > DATA_BYTES:
        raise ValueError(f"layers and page ids take {len(data)} bytes of a launch, at most {DATA_BYTES}")
    launch = Launch(
        planes=len(planes), layers=len(layers) // len(planes),
        plane=(LaunchPlane * MAX_PLANES)(*planes), **rest,
    )  # fmt: skip
    ctypes.memmove(ctypes.addressof(launch) + Launch.data.offset, data, len(data))
    return launch


def tile_count(tokens: Range, heads: Range, fmt: WireFormat) -> int:
    """Of one plane of one layer."""
    groups = (tokens.first + tokens.length - 1) // fmt.group_tokens - tokens.first // fmt.group_tokens + 1
    return groups * heads.length
