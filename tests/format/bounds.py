# SPDX-License-Identifier: Apache-2.0
"""The error bounds that docs/format.md states, computed independently of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sage_kv_connector.contract.dtypes import CODE_MAX, dtype
from sage_kv_connector.format.reference import F32, levels
from sage_kv_connector.format.wire_format import WireFormat

F64 = npt.NDArray[np.float64]

#: dtype → (relative half step of normal numbers, half of the smallest denormal, largest finite value).
HALF_STEPS = {
    "fp32": (2.0**-24, 2.0**-150, (2 - 2.0**-23) * 2.0**127),
    "fp16": (2.0**-11, 2.0**-25, 65504.0),
    "bf16": (2.0**-8, 2.0**-134, (2 - 2.0**-7) * 2.0**127),
    "fp8_e4m3": (2.0**-4, 2.0**-10, 448.0),
    "fp8_e5m2": (2.0**-3, 2.0**-17, 57344.0),
}
#: What the fp32 steps before and after the rounding to a code may add, relative.
FP32_STEPS = 2.0**-20


def cast_bound(values: F64, dtype: str) -> F64:
    """Largest error of casting ``values`` (at most the largest finite value) to ``dtype``."""
    relative, absolute, _ = HALF_STEPS[dtype]
    return np.maximum(relative * np.abs(values), absolute)


def largest_scale(values: F64, fmt: WireFormat) -> Any:
    """An upper bound of the scales of a tile of finite values, to broadcast over (tokens, dim)."""
    axis = {"channel": (0,), "token": (1,), "head": (0, 1)}[fmt.granularity]
    if fmt.zero_point:
        low = values.min(axis=axis, keepdims=True)
        span = values.max(axis=axis, keepdims=True) - low
        exact = (span + 2.0**-7 * np.abs(low) + 2.0**-133) / levels(fmt.dtype)
    else:
        exact = np.abs(values).max(axis=axis, keepdims=True) / CODE_MAX[fmt.dtype]
    return np.maximum(exact * (1 + 2.0**-7) * (1 + FP32_STEPS), 2.0**-100)


def wire_bound(values: F32, fmt: WireFormat, tensor_scale: float) -> F64:
    """Largest error of finite ``values`` through ``fmt``."""
    exact = values.astype(np.float64)
    if fmt.granularity == "none":
        return cast_bound(exact, fmt.dtype)
    scale = float(np.float32(tensor_scale)) if fmt.granularity == "tensor" else largest_scale(exact, fmt)
    if dtype(fmt.dtype).kind == "integer":
        bound = scale / 2 + FP32_STEPS * scale
        if fmt.zero_point:
            axis = {"channel": (0,), "token": (1,), "head": (0, 1)}[fmt.granularity]
            bound = bound + 2.0**-23 * np.abs(exact).max(axis=axis, keepdims=True)
        return np.broadcast_to(bound, exact.shape)
    relative, absolute, _ = HALF_STEPS[fmt.dtype]
    return np.asarray(np.maximum(relative * np.abs(exact), absolute * scale) * (1 + FP32_STEPS))
