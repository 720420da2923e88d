# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' code, compiled for the host, against the golden vectors and the reference."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES
from sage_kv_connector.format.reference import RAW
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.cuda.launch import (
    LayerPlane,
    PlaneLayout,
    launch_argument,
    launch_plane,
    tile_count,
)
from sage_kv_connector.kernels.plane import Range
from tests.kernels.tiles import (
    KERNELS,
    PagedCase,
    all_golden_vectors,
    formats,
    host_library,
    paged_case,
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    output = tmp_path_factory.mktemp("cuda") / "cuda_on_host.so"
    source = Path(__file__).with_name("cuda_on_host.cc")
    return ctypes.CDLL(str(host_library(source, output, "-DKV_HOST_SHIM", f"-I{KERNELS / 'cuda'}")))


def aligned_bytes(count: int) -> np.ndarray:
    """``count`` bytes of garbage at an address that is a multiple of 16."""
    data = np.full(count + 16, 0xA5, np.uint8)
    start = -data.ctypes.data % 16
    return data[start : start + count]


def launch(
    library: ctypes.CDLL, case: PagedCase, store: np.ndarray, wire: np.ndarray, threads: int, decode: bool
) -> None:
    """Pages of a case begin anywhere: each is so many elements from the store's start."""
    ids = np.ascontiguousarray(case.starts[case.tokens.first // case.page_tokens :], np.int32)
    layer = LayerPlane(store.ctypes.data, case.memory_scale, case.wire_scale)
    plane = launch_plane(PlaneLayout(case.strides, store.itemsize, case.dim, case.fmt))
    argument = launch_argument(
        [plane], [layer], ids, ids.ctypes.data if decode else 0, wire=wire.ctypes.data,
        page_tokens=case.page_tokens, first_token=case.tokens.first, tokens=case.tokens.length,
        first_head=case.heads.first, heads=case.heads.length,
    )  # fmt: skip
    blocks = (ctypes.c_uint * 2)(tile_count(case.tokens, case.heads, case.fmt), 1)
    function = library[f"kv_{'decode' if decode else 'encode'}_{case.dtype}_{case.fmt.dtype}"]
    function(ctypes.byref(argument), blocks, threads, 0)


def test_golden_vectors(library: ctypes.CDLL) -> None:
    for vector in all_golden_vectors():
        tokens, dim = vector.memory.shape
        for threads in (1, 64):
            case = PagedCase(
                vector.format, vector.dtype, vector.memory.reshape(-1), np.array([0]), (0, dim, 1), tokens, dim,
                Range(0, tokens), Range(0, 1), 1.0, vector.tensor_scale,
            )  # fmt: skip
            expected = vector.tile
            wire = aligned_bytes(len(expected))
            launch(library, case, case.store, wire, threads, decode=False)
            np.testing.assert_array_equal(wire, expected, vector.name)
            for dtype in CONVERTIBLE_DTYPES:
                store = np.zeros(tokens * dim, RAW[dtype])
                launch(library, case._replace(dtype=dtype), store, wire, threads, decode=True)
                np.testing.assert_array_equal(
                    store, vector.decoded[dtype].reshape(-1), f"{vector.name} {dtype}"
                )


@settings(max_examples=250)
@given(
    seed=st.integers(0, 2**32),
    fmt=formats(),
    dtype=st.sampled_from(CONVERTIBLE_DTYPES),
    threads=st.sampled_from((1, 64, 256)),
)
def test_random_pages(library: ctypes.CDLL, seed: int, fmt: WireFormat, dtype: str, threads: int) -> None:
    case = paged_case(seed, fmt, dtype)
    with np.errstate(all="ignore"):
        expected = case.encoded()
        garbage = np.random.default_rng(seed).integers(0, 255, len(case.store)).astype(case.store.dtype)
        scattered = case.decoded(expected, garbage)
    wire = aligned_bytes(len(expected))
    launch(library, case, case.store, wire, threads, decode=False)
    np.testing.assert_array_equal(wire, expected)
    launch(library, case, garbage, wire, threads, decode=True)
    np.testing.assert_array_equal(garbage, scattered)
