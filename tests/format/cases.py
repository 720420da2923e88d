# SPDX-License-Identifier: Apache-2.0
"""Formats and values that the tests of the wire format go through."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CAST_DTYPES, SCALED_DTYPES, dtype
from sage_kv_connector.format.reference import F32
from sage_kv_connector.format.wire_format import Granularity, WireFormat

GROUP_TOKENS = (1, 16, 32, 64)


def every_format() -> list[WireFormat]:
    """Each allowed combination of dtype, granularity and zero point, with several group sizes."""
    found = [WireFormat(dtype, "none", group) for dtype in CAST_DTYPES for group in GROUP_TOKENS]
    for granularity, group in itertools.product(get_args(Granularity), GROUP_TOKENS):
        for name in SCALED_DTYPES:
            if dtype(name).kind == "float" or granularity in ("channel", "token", "head"):
                offsets = (False, True) if dtype(name).zero_point else (False,)
                found += [WireFormat(name, granularity, group, zero_point=zero) for zero in offsets]
    return found


@st.composite
def tiles(draw: st.DrawFn, finite: bool = False) -> F32:
    """(tokens, dim) values: normal ones at a drawn magnitude, with outlier, constant, zero and denormal
    channels, and (unless ``finite``) ±Inf and NaN."""
    tokens, dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.normal(size=(tokens, dim)).astype(np.float32)
    values *= np.float32(2.0 ** draw(st.integers(-20, 20)))
    for _ in range(draw(st.integers(0, 4))):
        channel = int(rng.integers(dim))
        kind = draw(st.sampled_from(("outlier", "offset", "constant", "zero", "denormal", "huge", "tiny")))
        if kind == "outlier":
            values[:, channel] = np.clip(values[:, channel].astype(np.float64) * 500, -1e38, 1e38)
        elif kind == "offset":
            values[:, channel] += np.float32(50 * min(1e36, float(np.abs(values[:, channel]).max())))
        elif kind == "huge":
            values[:, channel] = (rng.uniform(-1.5e38, 1.5e38, tokens)).astype(np.float32)
        else:
            values[:, channel] = {"constant": 5.0, "zero": -0.0, "denormal": 1e-41, "tiny": 3e-35}[kind]
    if not finite:
        for _ in range(draw(st.integers(0, 3))):
            place = int(rng.integers(tokens)), int(rng.integers(dim))
            values[place] = draw(st.sampled_from((np.inf, -np.inf, np.nan)))
    return values
