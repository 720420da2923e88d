# SPDX-License-Identifier: Apache-2.0
"""The CUDA, Ascend C, BANG C and XPU C++ kernels, compiled for the host: the golden vectors and the reference."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_kv_connector.contract.dtypes import CONVERTIBLE_DTYPES
from sage_kv_connector.format.reference import RAW
from sage_kv_connector.format.wire_format import WireFormat
from sage_kv_connector.kernels.common.launch import (
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
    passed,
)


class Kernels(NamedTuple):
    """All pairs of dtypes. ``shapes``: blocks (0: one a tile) and threads of launches to try."""

    library: ctypes.CDLL
    shapes: tuple[tuple[int, int], ...]
    whole_rows: bool  #: channels must be neighbours, and codes whole bytes a row

    def have(self, strides: tuple[int, int, int], dim: int, fmt: WireFormat) -> bool:
        return not self.whole_rows or (strides[2] == 1 and not (fmt.dtype == "int4" and dim % 2))


@pytest.fixture(scope="session", params=["cuda", "ascend", "bang", "xpu"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    folder, shapes = {
        "cuda": ("cuda", ((0, 1), (0, 64), (0, 256))),
        "ascend": ("ascend", ((1, 1), (3, 1), (40, 1))),
        "bang": ("cambricon", ((1, 1), (3, 1), (64, 1))),
        "xpu": ("kunlunxin", ((1, 1), (2, 3), (8, 64))),
    }[request.param]
    output = tmp_path_factory.mktemp(request.param) / "on_host.so"
    source = Path(__file__).with_name(f"{request.param}_on_host.cc")
    options = ("-DKV_HOST_SHIM", f"-I{KERNELS}", f"-I{KERNELS / folder}")
    return Kernels(ctypes.CDLL(str(host_library(source, output, *options))), shapes, request.param != "cuda")


def aligned_bytes(count: int) -> np.ndarray:
    """``count`` bytes of garbage at an address that is a multiple of 16."""
    data = np.full(count + 16, 0xA5, np.uint8)
    start = -data.ctypes.data % 16
    return data[start : start + count]


def launch(
    library: ctypes.CDLL,
    case: PagedCase,
    store: np.ndarray,
    wire: np.ndarray,
    shape: tuple[int, int],
    decode: bool,
) -> None:
    """Pages of a case begin anywhere: each is so many elements from the store's start."""
    ids = np.ascontiguousarray(case.starts[case.tokens.first // case.page_tokens :], np.int32)
    layer = LayerPlane(store.ctypes.data, case.memory_scale, case.wire_scale)
    plane = launch_plane(PlaneLayout(case.strides, store.itemsize, case.dim, case.fmt))
    argument = launch_argument(
        [plane], [layer], ids, wire=wire.ctypes.data,
        page_tokens=case.page_tokens, first_token=case.tokens.first, tokens=case.tokens.length,
        first_head=case.heads.first, heads=case.heads.length,
    )  # fmt: skip
    blocks = (ctypes.c_uint * 2)(shape[0] or tile_count(case.tokens, case.heads, case.fmt), 1)
    name = f"kv_{'decode' if decode else 'encode'}_{case.dtype}_{case.fmt.dtype}"
    library[name](passed(library, name, bytes(argument)), blocks, shape[1], 0)


def test_golden_vectors(kernels: Kernels) -> None:
    library = kernels.library
    for vector in all_golden_vectors():
        tokens, dim = vector.memory.shape
        assert kernels.have((0, dim, 1), dim, vector.format)
        for shape in kernels.shapes[:2]:
            case = PagedCase(
                vector.format, vector.dtype, vector.memory.reshape(-1), np.array([0]), (0, dim, 1), tokens, dim,
                Range(0, tokens), Range(0, 1), 1.0, vector.tensor_scale,
            )  # fmt: skip
            expected = vector.tile
            wire = aligned_bytes(len(expected))
            launch(library, case, case.store, wire, shape, decode=False)
            np.testing.assert_array_equal(wire, expected, vector.name)
            for dtype in CONVERTIBLE_DTYPES:
                store = np.zeros(tokens * dim, RAW[dtype])
                launch(library, case._replace(dtype=dtype), store, wire, shape, decode=True)
                np.testing.assert_array_equal(
                    store, vector.decoded[dtype].reshape(-1), f"{vector.name} {dtype}"
                )


@settings(max_examples=250)
@given(
    seed=st.integers(0, 2**32),
    fmt=formats(),
    dtype=st.sampled_from(CONVERTIBLE_DTYPES),
    which=st.integers(0, 2),
)
def test_random_pages(kernels: Kernels, seed: int, fmt: WireFormat, dtype: str, which: int) -> None:
    library, shape = kernels.library, kernels.shapes[which]
    case = paged_case(seed, fmt, dtype)
    while not kernels.have(case.strides, case.dim, fmt):
        seed += 1
        case = paged_case(seed, fmt, dtype)
    with np.errstate(all="ignore"):
        expected = case.encoded()
        garbage = np.random.default_rng(seed).integers(0, 255, len(case.store)).astype(case.store.dtype)
        scattered = case.decoded(expected, garbage)
    wire = aligned_bytes(len(expected))
    launch(library, case, case.store, wire, shape, decode=False)
    np.testing.assert_array_equal(wire, expected)
    launch(library, case, garbage, wire, shape, decode=True)
    np.testing.assert_array_equal(garbage, scattered)
