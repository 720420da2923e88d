# SPDX-License-Identifier: Apache-2.0
"""Casts of the reference and of torch operations against ml_dtypes, which shares no code with them."""

from __future__ import annotations

import numpy as np
import pytest

from sage_kv_connector.format.reference import RAW, from_float, to_float

ml_dtypes = pytest.importorskip("ml_dtypes")
TYPES = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("dtype", TYPES)
def test_every_code(dtype: str) -> None:
    codes = np.arange(1 << 8 * np.dtype(RAW[dtype]).itemsize).astype(RAW[dtype])
    expected = codes.view(TYPES[dtype]).astype(np.float32)
    values = to_float(codes, dtype)
    np.testing.assert_array_equal(values, expected)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(from_float(values[finite], dtype), codes[finite])


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding(dtype: str) -> None:
    torch_fallback = pytest.importorskip("sage_kv_connector.kernels.torch_fallback")
    largest = float(ml_dtypes.finfo(TYPES[dtype]).max)
    bits = np.random.default_rng(1).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint32) << 16  # ties of fp8 and all of bf16
    values = np.concatenate([bits, halves, halves | 0x8000, halves | 0x8001]).view(np.float32)
    values = values[np.abs(values) <= largest]
    expected = values.astype(TYPES[dtype]).view(RAW[dtype])
    np.testing.assert_array_equal(from_float(values, dtype), expected)
    torch = pytest.importorskip("torch")
    raw = torch_fallback.from_fp32(torch.from_numpy(values), dtype).numpy().view(RAW[dtype])
    np.testing.assert_array_equal(raw, expected)
