# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES, dtype
from sage_kv_connector.format.reference import F32, decode_tile, encode_tile, from_float, to_float
from sage_kv_connector.format.wire_format import WireFormat
from tests.format.bounds import HALF_STEPS, cast_bound, wire_bound
from tests.format.cases import every_format, tiles

TENSOR_SCALE = 0.37


def through(values: F32, fmt: WireFormat) -> F32:
    tokens, dim = values.shape
    tile = encode_tile(values, fmt, TENSOR_SCALE)
    assert tile.dtype == np.uint8 and tile.nbytes == fmt.tile_bytes(tokens, dim)
    return decode_tile(tile, fmt, tokens, dim, TENSOR_SCALE)


@pytest.mark.parametrize("memory", CONVERTIBLE_DTYPES)
@given(fmt=st.sampled_from(every_format()), drawn=tiles(finite=True))
@settings(max_examples=300)
def test_finite_values_come_back_within_the_stated_bound(memory: str, fmt: WireFormat, drawn: F32) -> None:
    values = to_float(from_float(drawn, memory), memory)
    wire = through(values, fmt)
    back = to_float(from_float(wire, memory), memory)
    largest = HALF_STEPS[fmt.dtype][2] if dtype(fmt.dtype).kind == "float" else np.inf
    if fmt.granularity == "tensor":
        largest = largest * float(np.float32(TENSOR_SCALE))
    # Only a cast and the engine's own scale can saturate: towards the largest value, never to ±Inf.
    held = np.clip(values, -largest, largest) if not fmt.sends_scales else values.astype(np.float64)
    assert np.isfinite(back).all()
    error = np.abs(back.astype(np.float64) - held)
    bound = wire_bound(held.astype(np.float32), fmt, TENSOR_SCALE) + cast_bound(
        wire.astype(np.float64), memory
    )
    assert (error <= bound).all(), (fmt, error.max(), np.argmax(error - bound))


@given(fmt=st.sampled_from(every_format()), values=tiles())
@settings(max_examples=500)
def test_nan_and_infinities_follow_their_rules(fmt: WireFormat, values: F32) -> None:
    back = through(values, fmt)
    nan, inf = np.isnan(values), np.isinf(values)
    assert (np.isnan(back) == (nan & (dtype(fmt.dtype).kind == "float"))).all()
    if fmt.dtype in ("fp32", "fp16", "bf16"):
        assert (back[inf] == values[inf]).all()
        return
    assert np.isfinite(back[~nan]).all()
    if fmt.sends_scales and not fmt.zero_point:
        # ±Inf becomes the code of largest magnitude, with its sign.
        assert (np.sign(back[inf]) == np.sign(values[inf])).all()


@given(fmt=st.sampled_from([f for f in every_format() if f.sends_scales]), values=tiles())
@settings(max_examples=300)
def test_non_finite_elements_do_not_change_the_scales_of_others(fmt: WireFormat, values: F32) -> None:
    tokens, dim = values.shape
    scales = fmt.sections(tokens, dim)[0]
    finite = np.where(np.isfinite(values), values, np.float32(0))
    assert (encode_tile(values, fmt)[:scales] == encode_tile(finite, fmt)[:scales]).all()


@given(fmt=st.sampled_from(every_format()), tokens=st.integers(1, 20), dim=st.integers(1, 20))
def test_denormals_become_zero_in_every_scaled_format(fmt: WireFormat, tokens: int, dim: int) -> None:
    values = np.full((tokens, dim), np.float32(1e-39))
    back = through(values, fmt)
    if fmt.sends_scales and not fmt.zero_point:
        assert (back == 0).all()
    assert (np.abs(back - values) <= wire_bound(values, fmt, TENSOR_SCALE)).all()


@given(fmt=st.sampled_from([f for f in every_format() if f.sends_scales]), values=tiles(finite=True))
def test_a_channel_of_zeros_stays_zero_next_to_outliers(fmt: WireFormat, values: F32) -> None:
    values[:, 0] = 0
    if not fmt.zero_point:
        assert (through(values, fmt)[:, 0] == 0).all()


@given(values=tiles(finite=True))
def test_an_outlier_channel_costs_others_nothing_with_channel_scales(values: F32) -> None:
    alone = through(values, WireFormat("int4", "channel"))
    louder = values.copy()
    louder[:, 0] = np.float32(1e30)
    assert (through(louder, WireFormat("int4", "channel"))[:, 1:] == alone[:, 1:]).all()


def test_a_tile_of_known_bytes() -> None:
    """Two tokens of three channels, worked out by hand."""
    values = np.array([[7.0, -14.0, 0.0], [-3.5, 14.0, 0.25]], np.float32)
    tile = encode_tile(values, WireFormat("int4", "channel"))
    # Scales 1, 2 and 0.25/7 rounded up to bf16; codes 7, -7, 0 | -4 (-3.5 to even), 7, 7.
    assert tile[:6].tobytes() == bytes.fromhex("803f 0040 133d")
    assert tile[6:16].tobytes() == bytes(10)
    assert tile[16:19].tobytes() == bytes([0x97, 0xC0, 0x77])
    assert tile.nbytes == 32 and not tile[19:].any()
