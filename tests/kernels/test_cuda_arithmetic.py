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
from sage_kv_connector.kernels.cuda.launch import Plane, launch_shape, tile_count
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
    return ctypes.CDLL(str(host_library(source, output, f"-I{KERNELS / 'cuda'}")))


def aligned_bytes(count: int) -> np.ndarray:
    """``count`` bytes of garbage at an address that is a multiple of 16."""
    data = np.full(count + 16, 0xA5, np.uint8)
    start = -data.ctypes.data % 16
    return data[start : start + count]


def launch(
    library: ctypes.CDLL, case: PagedCase, store: np.ndarray, wire: np.ndarray, threads: int, decode: bool
) -> None:
    pages = (store.ctypes.data + case.starts * store.itemsize).astype(np.uint64)
    table = np.ascontiguousarray(pages[case.tokens.first // case.page_tokens :])
    plane = Plane(table.ctypes.data, wire.ctypes.data, case.memory_scale, case.wire_scale)
    shape = launch_shape(case.strides, case.page_tokens, case.dim, case.tokens, case.heads, case.fmt)
    tiles = tile_count(case.tokens, case.heads, case.fmt)
    arguments = (ctypes.byref(plane), ctypes.byref(shape), tiles, threads)
    assert library.kv_launch(case.dtype.encode(), case.fmt.dtype.encode(), int(decode), *arguments) == 0


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
