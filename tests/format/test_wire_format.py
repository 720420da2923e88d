# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CAST_DTYPES, SCALED_DTYPES, WIRE_DTYPES, dtype
from sage_kv_connector.format.defaults import default_format
from sage_kv_connector.format.wire_format import SECTION_ALIGNMENT, WireFormat, tile_tokens
from tests.format.cases import every_format


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ({"dtype": "int3"}, "dtype", "'int3'"),
        ({"dtype": "bf16", "granularity": "channel"}, "granularity", "'channel'"),
        ({"dtype": "int4", "granularity": "none"}, "granularity", "'none'"),
        ({"dtype": "int4", "granularity": "tensor"}, "granularity", "'tensor'"),
        ({"dtype": "fp8_e4m3", "granularity": "row"}, "granularity", "'row'"),
        ({"dtype": "fp32", "group_tokens": 0}, "group_tokens", "0"),
        ({"dtype": "fp32", "group_tokens": 1025}, "group_tokens", "1025"),
        ({"dtype": "fp8_e5m2", "zero_point": True}, "zero_point", "fp8_e5m2"),
    ],
)
def test_an_error_names_the_field_and_its_value(arguments: dict[str, Any], field: str, value: str) -> None:
    with pytest.raises(ValueError, match=field) as raised:
        WireFormat(**arguments)
    assert value in str(raised.value)


@given(
    fmt=st.sampled_from(every_format()),
    first=st.integers(0, 5000),
    tokens=st.integers(0, 700),
    dim=st.sampled_from((1, 3, 16, 64, 80, 128)),
)
def test_span_bytes_are_the_sum_of_its_tiles(fmt: WireFormat, first: int, tokens: int, dim: int) -> None:
    counts = tile_tokens(first, tokens, fmt.group_tokens)
    assert sum(counts) == tokens
    assert fmt.span_bytes(first, tokens, dim) == sum(fmt.tile_bytes(count, dim) for count in counts)


@given(first=st.integers(0, 5000), tokens=st.integers(1, 2000), group=st.integers(1, 300))
def test_tiles_end_at_multiples_of_the_group(first: int, tokens: int, group: int) -> None:
    place = first
    counts = tile_tokens(first, tokens, group)
    for count in counts[:-1]:
        place += count
        assert place % group == 0
    assert all(1 <= count <= group for count in counts)


@given(fmt=st.sampled_from(every_format()), tokens=st.integers(1, 130), dim=st.integers(1, 130))
def test_each_section_is_padded_to_sixteen_bytes(fmt: WireFormat, tokens: int, dim: int) -> None:
    scales, zeros, codes = fmt.sections(tokens, dim)
    assert all(section % SECTION_ALIGNMENT == 0 for section in (scales, zeros, codes))
    assert 0 <= scales - 2 * fmt.scale_count(tokens, dim) < SECTION_ALIGNMENT
    assert zeros == (scales if fmt.zero_point else 0)
    bits = dtype(fmt.dtype).bits
    assert 0 <= codes - (tokens * dim * bits + 7) // 8 < SECTION_ALIGNMENT
    assert fmt.tile_bytes(tokens, dim) == scales + zeros + codes


@pytest.mark.parametrize("plane", ["k", "v", "latent"])
@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_there_is_a_default_for_every_dtype_and_plane(dtype: str, plane: str) -> None:
    fmt = default_format(dtype, plane)
    assert fmt.dtype == dtype
    assert fmt.sends_scales == (dtype in SCALED_DTYPES)
    assert (fmt.granularity == "none") == (dtype in CAST_DTYPES)
    if plane == "latent":
        assert fmt == default_format(dtype, "k")


def test_an_unknown_plane_or_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="plane is 'q'"):
        default_format("int4", "q")
    with pytest.raises(ValueError, match="dtype is 'int3'"):
        default_format("int3", "k")
