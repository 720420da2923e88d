# SPDX-License-Identifier: Apache-2.0
"""The casts against torch's, which knows nothing of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.format.reference import F32, RAW, from_float, to_float
from tests.format.bounds import HALF_STEPS

torch = pytest.importorskip("torch")

TORCH: dict[str, Any] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
NARROW = tuple(TORCH)
CODES = {"fp16": 65536, "bf16": 65536, "fp8_e4m3": 256, "fp8_e5m2": 256}


def all_values(dtype: str) -> F32:
    raw = np.arange(CODES[dtype]).astype(RAW[dtype])
    return to_float(raw, dtype)


def torch_raw(values: F32, dtype: str) -> Any:
    cast = torch.from_numpy(values.copy()).to(TORCH[dtype])
    return cast.view(torch.uint8 if dtype.startswith("fp8") else torch.int16).numpy().view(RAW[dtype])


def assert_equal_casts(values: F32, dtype: str) -> None:
    """Where torch's rule is ours: NaN aside, and up to the largest finite value."""
    held = values[np.abs(values) <= HALF_STEPS[dtype][2]]
    assert (from_float(held, dtype) == torch_raw(held, dtype)).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_every_code_means_what_torch_reads(dtype: str) -> None:
    raw = np.arange(CODES[dtype]).astype(RAW[dtype])
    theirs = torch.from_numpy(raw.view(np.uint8 if raw.itemsize == 1 else np.int16)).view(TORCH[dtype])
    np.testing.assert_array_equal(to_float(raw, dtype), theirs.float().numpy())


@pytest.mark.parametrize("dtype", NARROW)
def test_every_code_survives_a_cast(dtype: str) -> None:
    values = all_values(dtype)
    known = np.isfinite(values)
    raw = np.arange(len(values)).astype(RAW[dtype])
    assert (from_float(values[known], dtype) == raw[known]).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_ties_and_their_neighbours_round_as_in_torch(dtype: str) -> None:
    values = np.sort(all_values(dtype)[np.isfinite(all_values(dtype))])
    ties = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    infinity = np.float32(np.inf)
    assert_equal_casts(
        np.concatenate([ties, np.nextafter(ties, infinity), np.nextafter(ties, -infinity)]), dtype
    )


@pytest.mark.parametrize("dtype", NARROW)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
@settings(max_examples=300)
def test_any_bits_round_as_in_torch(dtype: str, bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    assert_equal_casts(values[np.isfinite(values)], dtype)


@pytest.mark.parametrize("dtype", (*NARROW, "fp32"))
def test_finite_values_saturate_and_nan_keeps_its_sign(dtype: str) -> None:
    largest = HALF_STEPS[dtype][2]
    values = np.array([3.4e38, -3.4e38, np.inf, -np.inf, np.nan, -np.nan, -0.0], np.float32)
    back = to_float(from_float(values, dtype), dtype)
    most = np.float32(min(largest, 3.4e38))
    assert back[:2].tolist() == [most, -most] or dtype == "bf16"
    assert np.isfinite(back[:2]).all()
    infinity = most if dtype.startswith("fp8") else np.inf
    assert back[2:4].tolist() == [infinity, -infinity]
    assert np.isnan(back[4:6]).all() and np.signbit(back[4:7]).tolist() == [False, True, True]
