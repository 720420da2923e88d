# SPDX-License-Identifier: Apache-2.0
"""The AscendC kernels over an emulation of their intrinsics, against golden vectors and pages."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.format.reference import RAW
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.plane import Range
from tests.kernels.tiles import KERNELS, PagedCase, all_golden_vectors, host_library, paged_case

DTYPES = ("fp32", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int4")
GRANULARITIES = {"channel": 2, "token": 3, "head": 4}


class CoreLaunch(ctypes.Structure):
    """``kv::CoreLaunch`` of core_tile.h."""

    _fields_ = (
        ("pages", ctypes.c_uint64),
        ("wire", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("first_token", "tokens", "head_stride", "token_stride")),
        *((name, ctypes.c_int32) for name in ("page_tokens", "group_tokens", "first_head", "heads", "dim")),
        *((name, ctypes.c_int32) for name in ("granularity", "memory", "wire_dtype")),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(__file__).with_name("ascend_on_host.cc")
    output = tmp_path_factory.mktemp("ascend") / "kernel.so"
    options = ("-DKV_HOST_SHIM", f"-I{KERNELS}", f"-I{KERNELS / 'ascend'}")
    return ctypes.CDLL(str(host_library(source, output, *options)))


def launch(library: ctypes.CDLL, case: PagedCase, store: np.ndarray, wire: np.ndarray, decode: bool) -> None:
    pages = (store.ctypes.data + case.starts * store.itemsize).astype(np.uint64)
    table = np.ascontiguousarray(pages[case.tokens.first // case.page_tokens :])
    assert case.strides[2] == 1
    arguments = CoreLaunch(
        table.ctypes.data, wire.ctypes.data, case.tokens.first, case.tokens.length, *case.strides[:2],
        case.page_tokens, case.fmt.group_tokens, case.heads.first, case.heads.length, case.dim,
        GRANULARITIES[case.fmt.granularity], DTYPES.index(case.dtype), DTYPES.index(case.fmt.dtype),
    )  # fmt: skip
    assert library.kv_launch(ctypes.byref(arguments), int(decode)) == 0


def served(fmt: WireFormat) -> bool:
    return fmt.granularity in GRANULARITIES and not fmt.zero_point


def test_golden_vectors(library: ctypes.CDLL) -> None:
    tested = 0
    for vector in all_golden_vectors():
        if not served(vector.format) or vector.dtype not in DTYPES[:3]:
            continue
        tokens, dim = vector.memory.shape
        case = PagedCase(
            vector.format, vector.dtype, vector.memory.reshape(-1), np.array([0]), (0, dim, 1), tokens, dim,
            Range(0, tokens), Range(0, 1), 1.0, 1.0,
        )  # fmt: skip
        wire = np.full(len(vector.tile), 0xA5, np.uint8)
        launch(library, case, case.store, wire, decode=False)
        np.testing.assert_array_equal(wire, vector.tile, vector.name)
        for dtype in DTYPES[:3]:
            store = np.zeros(tokens * dim, RAW[dtype])
            launch(library, case._replace(dtype=dtype), store, wire, decode=True)
            np.testing.assert_array_equal(store, vector.decoded[dtype].reshape(-1), f"{vector.name} {dtype}")
        tested += 1
    assert tested == 54


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    fmt=st.builds(
        WireFormat,
        st.sampled_from(("fp8_e4m3", "fp8_e5m2", "int4")),
        st.sampled_from(("channel", "token", "head")),
        st.integers(1, 70),
    ),
    dtype=st.sampled_from(DTYPES[:3]),
)
def test_random_pages(library: ctypes.CDLL, seed: int, fmt: WireFormat, dtype: str) -> None:
    case = paged_case(seed, fmt, dtype)
    while case.strides[2] != 1 or (fmt.dtype == "int4" and case.dim % 2):
        seed += 1
        case = paged_case(seed, fmt, dtype)
    with np.errstate(all="ignore"):
        expected = case.encoded()
        garbage = np.random.default_rng(seed).integers(0, 255, len(case.store)).astype(case.store.dtype)
        scattered = case.decoded(expected, garbage)
    wire = np.full(len(expected), 0xA5, np.uint8)
    launch(library, case, case.store, wire, decode=False)
    np.testing.assert_array_equal(wire, expected)
    launch(library, case, garbage, wire, decode=True)
    np.testing.assert_array_equal(garbage, scattered)
